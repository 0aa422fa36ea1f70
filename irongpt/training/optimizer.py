"""The optimizer of a training step: AdamW and Muon, schedule, loss scaling, clipping, averaging.

The op `grad_norm` computes the norm of all gradients in one pass. Then `adamw` and Muon's ops
unscale, clip and apply them; if the norm is not finite, weights and moments stay unchanged. The
host never waits for the device, and all dtypes take the same path.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from irongpt_kernels import Ops, builtin
from irongpt_kernels.eager import GradStats
from torch import Tensor

from irongpt.config import TrainConfig
from irongpt.model import GPT
from irongpt.training.distributed import World
from irongpt.training.muon import Muon, matmul_dtype
from irongpt.training.shards import Shards

GROWTH_INTERVAL = 2000  # steps


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step `step`, counted from 0: linear warmup to lr, then decay to min_lr.

    It is lr / warmup at the first step and lr at step `warmup`. It would reach min_lr at step
    `iters`, one after the last.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.decay == "constant":
        return config.lr
    left = max(0.0, (config.iters - step) / max(1, config.iters - config.warmup))  # 1 to 0
    if config.decay == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left


def average_decay_at(step: int, config: TrainConfig) -> float:
    """The decay of the average of the weights at step `step`, counted from 0: `ema`, but less in
    the first steps, whose weights are soon out of date."""
    return min(config.ema, (1 + step) / (10 + step))


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or Muon for the blocks' matrices and AdamW for the rest.

    The parameters are float32. If one has a 16-bit copy, the copy receives the gradient, and
    every step updates the copy too. With config.ema it also keeps an exponential moving average of
    the parameters (Polyak and Juditsky 1992), which is better than each step's parameters while the
    learning rate is high.

    Float16 gradients below 3e-8 become zero, so the loss is multiplied by `scale`, which is halved
    after a non-finite gradient and doubled after GROWTH_INTERVAL steps without one (Micikevicius et
    al. 2018). In other dtypes it stays 1. The op `grad_norm` updates it.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        dtype: torch.dtype = torch.float32,
        ops: Ops = builtin,
        world: World | None = None,
    ) -> None:
        """model: on the device that trains. dtype: that of the step's matmuls."""
        self.config, self.ops = config, ops
        device = next(model.parameters()).device
        self.lr = torch.zeros((), device=device)  # read by every step
        self.scaled = dtype == torch.float16
        self.scale = torch.tensor(65536.0 if self.scaled else 1.0, device=device)
        self.growth_tracker = torch.tensor(0, device=device)
        self.low_precision_params = (  # parameter -> its 16-bit copy
            model.make_low_precision_params(dtype) if dtype.itemsize == 2 else {}
        )
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        matrices = [
            p for p, name in self.names.items() if name.startswith("blocks.") and p.dim() == 2
        ]
        params = matrices if config.optimizer == "muon" else []
        self.muon = Muon(params, config, matmul_dtype(dtype, device), ops, world or World())
        low = self.low_precision_params
        rest = [p for p in self.names if p not in self.muon.momentum]
        self.adamw_params = sorted(rest, key=lambda p: p not in low)  # those with a copy first
        self.exp_avg, self.exp_avg_sq = (
            {p: torch.zeros_like(p, requires_grad=False) for p in self.adamw_params}
            for _ in range(2)
        )
        self.steps = torch.zeros(len(self.adamw_params), device=device)
        self.average = {p: p.detach().clone() for p in self.names} if config.ema else {}
        self.new_share = torch.zeros((), device=device)  # 1 - the average's decay at this step

    def zero_grad(self) -> None:
        for p in (*self.names, *self.low_precision_params.values()):
            p.grad = None

    def gradient(self, p: Tensor) -> Tensor:
        """The float32 gradient of a parameter if it has one, else the gradient of its copy."""
        low = self.low_precision_params
        grad = low[p].grad if p.grad is None and p in low else p.grad
        if grad is None:
            raise ValueError(f"{self.names[p]} has no gradient")
        return grad

    def accumulate(self) -> None:
        """Moves the gradients of the copies to the float32 gradients, by addition."""
        first, narrow = [], []  # float32 gradients that do not exist yet, and their values
        for p, copy in self.low_precision_params.items():
            grad, copy.grad = copy.grad, None
            if grad is None:
                continue
            if p.grad is None:
                p.grad = torch.empty_like(p)
                first.append(p.grad)
                narrow.append(grad)
            else:
                p.grad += grad
        if first:
            torch._foreach_copy_(first, narrow)

    def gradients(self) -> list[Tensor]:
        """The gradients of all parameters, in the order of `names`."""
        return [self.gradient(p) for p in self.names]

    @torch.no_grad()
    def step(self, shards: Shards | None = None, summands: Tensor | None = None) -> Tensor:
        """Updates the parameters from the gradients of scale * loss, clipped to a global norm.

        shards: None for a step without shards. summands: the result of `shards.exchange()`. A step
        whose gradient norm is not finite changes neither parameters nor moments. Returns the norm
        of the unscaled gradients before clipping, 0-d.
        """
        config, low = self.config, self.low_precision_params
        state = self.scale, self.growth_tracker, self.steps
        growth_interval = GROWTH_INTERVAL if self.scaled else 0
        options: dict[str, Any] = dict(max_norm=config.grad_clip, growth_interval=growth_interval)
        if shards is None or summands is None:
            gradients = self.gradients()
            stats = self.ops.grad_norm(gradients, *state, **options)
        else:
            total, stats = self.ops.sum_shards(summands, *state, **options)
            gradients = shards.views(total)
        grads = dict(zip(self.names, gradients, strict=True))
        self.ops.adamw(
            self.adamw_params,
            [low[p] for p in self.adamw_params if p in low],
            [grads[p] for p in self.adamw_params],
            list(self.exp_avg.values()),
            list(self.exp_avg_sq.values()),
            self.steps,
            self.lr,
            stats,
            beta1=config.beta1,
            beta2=config.beta2,
            weight_decays=[config.weight_decay if p.dim() >= 2 else 0.0 for p in self.adamw_params],
        )
        self.muon.step(self.lr, stats, grads, low)
        if self.average:
            values = list(self.average.values())
            change = torch._foreach_sub(list(self.average), values)
            torch._foreach_mul_(change, self.new_share)
            torch._foreach_add_(values, change)
        return GradStats(*stats).norm

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model has the average of its weights, if one is kept."""
        self._exchange_average()
        try:
            yield
        finally:
            self._exchange_average()

    @torch.no_grad()
    def _exchange_average(self) -> None:
        for p, average in self.average.items():
            kept = p.clone()
            p.copy_(average)
            average.copy_(kept)
            if p in self.low_precision_params:
                self.low_precision_params[p].copy_(p)

    def _state(self) -> dict[str, Tensor]:
        state = {f"momentum.{self.names[p]}": m for p, m in self.muon.momentum.items()}
        for i, p in enumerate(self.adamw_params):
            name = self.names[p]
            state[f"step.{name}"] = self.steps[i]
            state[f"exp_avg.{name}"] = self.exp_avg[p]
            state[f"exp_avg_sq.{name}"] = self.exp_avg_sq[p]
        return state | {f"average.{self.names[p]}": a for p, a in self.average.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Step counts, moments and average, named `<kind>.<parameter>`, and the loss scale.

        Views are cloned, as safetensors requires.
        """
        state = {
            name: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t
            for name, t in self._state().items()
        }
        if self.scaled:
            state["scaler.scale"] = self.scale
            state["scaler.good_steps"] = self.growth_tracker
        return state

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores the result of `tensors`. Raises KeyError or ValueError if it does not fit."""
        state = self._state()
        for name, t in state.items():
            if tensors[name].shape != t.shape:
                raise ValueError(f"{name} has another shape")
        for name, t in state.items():
            t.copy_(tensors[name])
        if self.scaled and "scaler.scale" in tensors:  # not if the run had another dtype
            self.scale.copy_(tensors["scaler.scale"])
            self.growth_tracker.copy_(tensors["scaler.good_steps"])
