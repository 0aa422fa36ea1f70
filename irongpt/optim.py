"""AdamW as the training step drives it: parameter groups, schedule, loss scale, clipping.

One pass over the gradients takes their norm; one fused pass unscales them, clips them, and updates
weights and moments, or leaves everything as it is if the norm is not finite. The host never waits
for the device, and float32, bfloat16 and float16 go the same way.
"""

import math

import torch
from torch import Tensor, nn

from irongpt.config import TrainConfig


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019): the matrices decay, norms and biases do not."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


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
        good_steps = torch.where(bad, 0, self.good_steps + 1)
        grow = good_steps >= self.calm
        factor = torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale.copy_((self.scale * factor).clamp(1.0, 2.0**24))
        self.good_steps.copy_(torch.where(grow, 0, good_steps))


def step(optimizer: torch.optim.AdamW, scaler: LossScaler, lr: float, max_norm: float) -> Tensor:
    """Updates the weights from gradients of scale * loss, clipped to a global norm of max_norm.

    A step whose gradients are not finite changes neither weights nor moments. Returns the norm of
    the unscaled gradients before clipping, 0-d.
    """
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(grads, foreach=True) / scaler.scale
    overflow = (~norm.isfinite()).float()
    clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # As torch.amp.GradScaler tells a fused optimizer: divide by the one, skip where the other is 1.
    optimizer.grad_scale = scaler.scale / clip  # type: ignore[attr-defined]
    optimizer.found_inf = overflow  # type: ignore[attr-defined]
    optimizer.step()
    scaler.update(overflow)
    return norm
