"""The training step, the evaluation, and all the state that they depend on."""

import contextlib
from collections.abc import Callable

import torch
from irongpt_kernels import builtin, eager
from torch import Tensor

from irongpt import device as devices
from irongpt.config import TrainConfig
from irongpt.cuda_graph import Graph
from irongpt.data.batches import TrainBatches, ValBatches, split
from irongpt.model import DROPOUTS_PER_BLOCK, GPT
from irongpt.training import optimizer

EVAL_TOKENS = 1 << 13  # tokens per forward pass of an evaluation: as fast as more, and less memory


class Trainer:
    """A model in training: after `step` steps, everything that the next one depends on."""

    def __init__(
        self, model: GPT, ids: Tensor, config: TrainConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        """model: on `device`. ids: (N,) int64, the whole corpus, moved to `device`."""
        self.model, self.config, self.device, self.dtype = model, config, device, dtype
        context = model.config.context
        train_ids, val_ids = split(ids.to(device), context)
        self.train_batches = TrainBatches(train_ids, context, config.batch_size, config.seed)
        eval_batch = max(1, EVAL_TOKENS // context)
        self.val_batches = ValBatches(val_ids, context, eval_batch, config.eval_windows)
        self.scaler = optimizer.LossScaler(dtype == torch.float16, device)
        self.lr = torch.zeros((), device=device)
        self.optimizer = optimizer.Optimizer(
            model,
            config,
            self.scaler,
            self.lr,
            # Eager's plain loop is a specification, and a thousand launches: no way to train.
            builtin if model.ops is eager else model.ops,
            model.copy_weights(dtype) if dtype.itemsize == 2 else None,
            dtype,
        )
        # What a step takes, a row for each of its forward passes. The host fills them in place.
        self.firsts = torch.zeros(
            config.grad_accum, config.batch_size, dtype=torch.int64, device=device
        )
        self.seeds = torch.zeros(config.grad_accum, dtype=torch.int64, device=device)
        self.step = 0
        captured = device.type == "cuda" and config.graph
        self.run_step = Graph(self._run_step, device) if captured else self._run_step

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return devices.autocast(self.device, self.dtype)

    def tokens_per_step(self) -> int:
        config = self.config
        return config.batch_size * config.grad_accum * self.model.config.context

    def train_step(self) -> Tensor:
        """One step of the optimizer. Returns (loss, gradient norm, loss scale), on the device."""
        self._fill()
        row = self.run_step()
        self.step += 1
        return row

    def _fill(self) -> None:
        """Writes what the step takes: pure functions of its number, so that nothing drifts."""
        config = self.config
        for i in range(config.grad_accum):
            batch = self.step * config.grad_accum + i
            self.firsts[i].copy_(self.train_batches.firsts(batch))
            dropouts = batch * DROPOUTS_PER_BLOCK * self.model.config.n_layer
            self.seeds[i].fill_((config.seed << 32) + dropouts)
        self.lr.fill_(optimizer.lr_at(self.step, config))

    def _run_step(self) -> Tensor:
        """The step on what `_fill` wrote. All of it happens on the device; see `graph`."""
        n = self.config.grad_accum
        self.optimizer.zero_grad()
        scale = self.scaler.scale.clone()
        losses = [self._backward(i) for i in range(n)]
        loss = torch.stack(losses).sum() / n if n > 1 else losses[0]
        norm = self.optimizer.step()
        return torch.stack((loss, norm, scale))

    def _backward(self, i: int) -> Tensor:
        """Gradients of forward pass i, scaled, beside those of the passes before. Its loss."""
        n = self.config.grad_accum
        loss = self._loss(i)
        loss.backward(self.scaler.scale / n if n > 1 else self.scaler.scale)
        if n > 1:
            self.optimizer.accumulate()
        return loss.detach()

    def _loss(self, i: int) -> Tensor:
        """Loss of the step's forward pass i, with the dropout that belongs to it."""
        x, y = self.train_batches.at(self.firsts[i])
        with self.autocast():
            return self.model.loss(x, y, seed=self.seeds[i])

    def evaluate(self, go_on: Callable[[], bool] = lambda: True) -> float | None:
        """Mean loss over the validation windows, without dropout; the training notices nothing.

        `go_on` is asked before each batch; None if it says no.
        """
        self.model.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        try:
            with torch.inference_mode(), self.autocast():
                for i in range(len(self.val_batches)):
                    if not go_on():
                        return None
                    x, y = self.val_batches[i]
                    total += self.model.loss(x, y) * len(x)
                    count += len(x)
        finally:
            self.model.train()
        return float(total) / count

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's moments, the loss scale and the global generators' states."""
        tensors = self.optimizer.tensors()
        if self.scaler.enabled:
            tensors["scaler.scale"] = self.scaler.scale
            tensors["scaler.good_steps"] = self.scaler.growth_tracker
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def restore(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Takes up where the trainer stood whose `optimizer_tensors` these are.

        Raises KeyError or ValueError if they are not this model's.
        """
        self.step = step
        if step:
            self.optimizer.restore(tensors)
        if self.scaler.enabled and "scaler.scale" in tensors:
            self.scaler.scale.copy_(tensors["scaler.scale"])
            self.scaler.growth_tracker.copy_(tensors["scaler.good_steps"])
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)

    def first_nonfinite(self) -> str:
        """Names the next step's first tensor that is not finite: a weight, output or gradient."""
        found: list[str] = []

        def look(what: str, *tensors: Tensor | None) -> None:
            if any(t is not None and not bool(t.isfinite().all()) for t in tensors):
                found.append(what)

        for name, p in self.model.named_parameters():
            look(f"the weight {name}", p)
        hooks = [
            module.register_forward_hook(
                lambda module, args, out, name=name: look(
                    f"the output of {name or 'the model'}",
                    *(out if isinstance(out, tuple) else (out,)),
                )
            )
            for name, module in self.model.named_modules()
        ]
        try:
            self._fill()
            loss = self._loss(0)
        finally:
            for hook in hooks:
                hook.remove()
        look("the loss", loss)
        if not found:
            self.optimizer.zero_grad()
            (loss * self.scaler.scale).backward()
            for name, p in reversed(list(self.model.named_parameters())):
                look(f"the gradient of {name}", self.optimizer.gradient(p))
        return found[0] if found else "none in the next step: the gradients' norm overflows"
