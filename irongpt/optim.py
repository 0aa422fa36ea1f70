"""The optimizer as the training step drives it: AdamW, Muon, schedule, loss scale, clipping.

One pass over the gradients takes their norm; then they are unscaled, clipped and applied, or, if
the norm is not finite, weights and moments stay as they are. The host never waits for the device,
and float32, bfloat16 and float16 go the same way.
"""

import math

import torch
from torch import Tensor, nn

from irongpt.config import TrainConfig
from irongpt.muon import Muon


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
    `enabled` the scale stays 1.
    """

    calm = 2000  # steps without an overflow before the scale doubles

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self.scale = torch.tensor(65536.0 if enabled else 1.0, device=device)
        self.good_steps = torch.tensor(0, device=device)

    def update(self, overflow: Tensor) -> None:
        """overflow: 0-d float, 1 if this step's gradients were not finite, else 0."""
        if not self.enabled:
            return
        bad = overflow > 0
        good_steps = (self.good_steps + 1).masked_fill(bad, 0)
        grow = good_steps >= self.calm
        factor = torch.ones_like(self.scale).masked_fill(grow, 2.0).masked_fill(bad, 0.5)
        self.scale.copy_((self.scale * factor).clamp(1.0, 2.0**24))
        self.good_steps.copy_(good_steps.masked_fill(grow, 0))


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) for all, or Muon for the blocks' matrices."""

    def __init__(
        self, model: nn.Module, config: TrainConfig, scaler: LossScaler, lr: Tensor
    ) -> None:
        """lr: the learning rate, 0-d float32 on the weights' device; every step reads it."""
        self.config, self.scaler, self.lr = config, scaler, lr
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.muon = Muon(
            [
                p
                for p, name in self.names.items()
                if config.optimizer == "muon" and name.startswith("blocks.") and p.dim() == 2
            ],
            config.momentum,
            config.weight_decay,
        )
        rest = [p for p in self.names if p not in self.muon.momentum]
        decayed, kept = [p for p in rest if p.dim() >= 2], [p for p in rest if p.dim() < 2]
        self.adamw = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": kept, "weight_decay": 0.0},  # norms and biases
            ],
            lr=lr,
            betas=(config.beta1, config.beta2),
            fused=True,
            capturable=lr.is_cuda,
        )
        # It would warn of a step outside of a graph, which is what the first ones are.
        self.adamw._warned_capturable_if_run_uncaptured = True

    def step(self) -> Tensor:
        """Updates the weights from the gradients of scale * loss, clipped to a global norm.

        A step whose gradients are not finite changes neither weights nor moments. Returns the
        norm of the unscaled gradients before clipping, 0-d.
        """
        grads = [p.grad for p in self.names if p.grad is not None]
        norm = nn.utils.get_total_norm(grads, foreach=True) / self.scaler.scale
        overflow = (~norm.isfinite()).float()
        divisor = self.scaler.scale * ((norm + 1e-6) / self.config.grad_clip).clamp(min=1.0)
        # As torch.amp.GradScaler tells a fused optimizer: divide by one, skip if the other is 1.
        self.adamw.grad_scale = divisor  # type: ignore[attr-defined]
        self.adamw.found_inf = overflow  # type: ignore[attr-defined]
        self.adamw.step()
        self.muon.step(self.lr, divisor, overflow)
        self.scaler.update(overflow)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """The moments, by the names of the moment and of the parameter."""
        state = {**self.adamw.state, **{p: {"momentum": m} for p, m in self.muon.momentum.items()}}
        return {f"{key}.{self.names[p]}": t for p in state for key, t in state[p].items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over a copy of what `tensors` gave. Raises KeyError or ValueError if it is not."""

        def moment(key: str, p: Tensor) -> Tensor:
            value = tensors[f"{key}.{self.names[p]}"]
            if value.shape != (() if key == "step" else p.shape):
                raise ValueError(f"the {key} of {self.names[p]} has another shape")
            return value.to(p.device, copy=True)

        for p in self.names:
            if p in self.muon.momentum:
                self.muon.momentum[p] = moment("momentum", p)
            else:
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.adamw.state[p] = {key: moment(key, p) for key in keys}
