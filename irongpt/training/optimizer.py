"""The optimizer as the training step drives it: AdamW, Muon, schedule, loss scale, clipping.

One pass over the gradients takes their norm, the op `grad_norm`; then, in `adamw` or in Muon's ops,
they are unscaled, clipped and applied, or, if the norm is not finite, weights and moments stay as
they are. The host never waits for the device, and float32, bfloat16 and float16 go the same way.
"""

import math

import torch
from irongpt_kernels import Ops, builtin
from irongpt_kernels.eager import GradStats
from torch import Tensor, nn

from irongpt.config import TrainConfig
from irongpt.training.muon import Muon, products_type


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step `step`, counted from 0: linear warmup to lr, then the decay to min_lr.

    The first step has lr / warmup, step `warmup` has lr, step `iters` (the first one not taken)
    and all after it would have min_lr.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.decay == "constant":
        return config.lr
    left = max(0.0, (config.iters - step) / max(1, config.iters - config.warmup))  # 1 to 0
    if config.decay == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018): half after an overflow, double after a calm.

    A float16 gradient below 6e-8 is zero; multiplying the loss keeps them above. Without
    `enabled` the scale stays 1. The op `grad_norm` updates both tensors.
    """

    growth_interval = 2000  # steps without an overflow before the scale doubles

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self.scale = torch.tensor(65536.0 if enabled else 1.0, device=device)
        self.growth_tracker = torch.tensor(0, device=device)


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) for all, or Muon for the blocks' matrices.

    The weights are float32. Where a weight has a 16-bit copy, the copy has its gradient, and every
    step writes the copy anew.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        scaler: LossScaler,
        lr: Tensor,
        ops: Ops = builtin,
        copies: dict[Tensor, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """lr: the learning rate, 0-d float32 on the weights' device; every step reads it.

        copies: of weights, leaves of a type of their own. dtype: of the step's matrix products.
        """
        self.config, self.scaler, self.lr, self.ops = config, scaler, lr, ops
        self.copies = copies or {}
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.muon = Muon(
            [
                p
                for p, name in self.names.items()
                if config.optimizer == "muon" and name.startswith("blocks.") and p.dim() == 2
            ],
            config.momentum,
            config.weight_decay,
            products_type(dtype, lr.device),
            ops,
        )
        rest = [p for p in self.names if p not in self.muon.momentum]
        self.adamw = sorted(rest, key=lambda p: p not in self.copies)  # as the op wants them
        self.exp_avg, self.exp_avg_sq = (
            {p: torch.zeros_like(p, requires_grad=False) for p in self.adamw} for _ in range(2)
        )
        self.steps = torch.zeros(len(self.adamw), device=lr.device)

    def zero_grad(self) -> None:
        for p in (*self.names, *self.copies.values()):
            p.grad = None

    def gradient(self, p: Tensor) -> Tensor:
        """The weight's own, in float32, where it has one, else that of its copy."""
        grad = self.copies[p].grad if p.grad is None and p in self.copies else p.grad
        if grad is None:
            raise ValueError(f"{self.names[p]} has no gradient")
        return grad

    def accumulate(self) -> None:
        """Adds the gradients of the copies to the weights' own, in float32, and drops them."""
        arrived = {p: c.grad for p, c in self.copies.items() if c.grad is not None}
        fresh = {p: grad for p, grad in arrived.items() if p.grad is None}
        for p, grad in arrived.items():
            if p in fresh:
                p.grad = torch.empty_like(p)
            elif p.grad is not None:
                p.grad += grad
            self.copies[p].grad = None
        if fresh:
            wide = [p.grad for p in fresh if p.grad is not None]
            torch._foreach_copy_(wide, list(fresh.values()))

    @torch.no_grad()
    def step(self) -> Tensor:
        """Updates the weights from the gradients of scale * loss, clipped to a global norm.

        A step whose gradients are not finite changes neither weights nor moments. Returns the
        norm of the unscaled gradients before clipping, 0-d.
        """
        config, scaler = self.config, self.scaler
        grads = {p: self.gradient(p) for p in self.names}
        stats = self.ops.grad_norm(
            list(grads.values()),
            scaler.scale,
            scaler.growth_tracker,
            self.steps,
            max_norm=config.grad_clip,
            growth_interval=scaler.growth_interval if scaler.enabled else 0,
        )
        self.ops.adamw(
            self.adamw,
            [self.copies[p] for p in self.adamw if p in self.copies],
            [grads[p] for p in self.adamw],
            list(self.exp_avg.values()),
            list(self.exp_avg_sq.values()),
            self.steps,
            self.lr,
            stats,
            beta1=config.beta1,
            beta2=config.beta2,
            weight_decays=[config.weight_decay if p.dim() >= 2 else 0.0 for p in self.adamw],
        )
        self.muon.step(self.lr, stats, grads, self.copies)
        return GradStats(*stats).norm

    def _state(self) -> dict[str, Tensor]:
        state = {f"momentum.{self.names[p]}": m for p, m in self.muon.momentum.items()}
        for i, p in enumerate(self.adamw):
            moments = self.steps[i], self.exp_avg[p], self.exp_avg_sq[p]
            for key, t in zip(("step", "exp_avg", "exp_avg_sq"), moments, strict=True):
                state[f"{key}.{self.names[p]}"] = t
        return state

    def tensors(self) -> dict[str, Tensor]:
        """The moments, by the names of the moment and of the parameter."""
        # A file takes no two tensors of one storage.
        return {
            name: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t
            for name, t in self._state().items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over a copy of what `tensors` gave. Raises KeyError or ValueError if it is not."""
        state = self._state()
        for name, t in state.items():
            if tensors[name].shape != t.shape:
                raise ValueError(f"{name} has another shape")
        for name, t in state.items():
            t.copy_(tensors[name])
