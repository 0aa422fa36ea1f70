"""The training step, the evaluation, and the state that they depend on."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from irongpt_kernels import builtin, eager
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from irongpt import device as devices
from irongpt.config import TrainConfig
from irongpt.cuda_graph import Graph
from irongpt.data.batches import Tokens, TrainBatches, evenly_spaced, every_target
from irongpt.model import DROPOUTS_PER_BLOCK, GPT
from irongpt.training.distributed import World
from irongpt.training.optimizer import Optimizer, average_decay_at, lr_at
from irongpt.training.shards import Shards

INT32_FROM = 1 << 27  # ids: this many or more are int32 on a GPU, as int64 would take a gigabyte
EVAL_TOKENS = 1 << 13  # per forward pass of an evaluation; more would not be faster
MARGIN = 0.02  # nats above its limit at which an evaluation stops early


class Trainer:
    """A model in training, with everything that its next step depends on."""

    def __init__(
        self,
        model: GPT,
        tokens: Tokens | Tensor,
        config: TrainConfig,
        device: torch.device,
        dtype: torch.dtype,
        world: World | None = None,
    ) -> None:
        """model: on `device`; the ids are moved there. tokens: a corpus, or (N,) ids of one text.

        world: the processes that train it together; its size divides config.shards.
        """
        self.world = world = world or World()
        self.model, self.config, self.device, self.dtype = model, config, device, dtype
        context = model.config.context
        self.tokens = tokens if isinstance(tokens, Tokens) else Tokens.of(tokens)
        self.tokens.check(context)
        train_ids, self.val_ids = (self._on_device(t) for t in (self.tokens.train, self.tokens.val))
        self.train_batches = TrainBatches(train_ids, context, config.batch_size, config.seed)
        self.eval_batch = max(1, EVAL_TOKENS // context)
        # Eager's optimizer loops over tensors, a thousand kernels: too slow to train with.
        ops = builtin if model.ops is eager else model.ops
        self.optimizer = Optimizer(model, config, dtype, ops, world)
        params, count = list(self.optimizer.names), config.shards
        self.shards = Shards(params, count, dtype, world) if count > 1 else None
        # Inputs of a step, one row per forward pass, which the host fills in place.
        passes = len(world.own_range(count)) * config.grad_accum
        shape = passes, config.batch_size // count
        self.positions = torch.zeros(shape, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(passes, dtype=torch.int64, device=device)
        self.signal = torch.zeros((), device=device)  # a signal that this process has received
        self.step = 0
        captured = device.type == "cuda" and config.graph
        self.run_step = (
            Graph(self._run_step, device, agree=world.all_true) if captured else self._run_step
        )

    def close(self) -> None:
        """Destroys the CUDA graph of the step: NCCL waits for it at the end of the processes."""
        if isinstance(self.run_step, Graph):
            self.run_step.close()

    def tokens_per_step(self) -> int:
        config = self.config
        return config.batch_size * config.grad_accum * self.model.config.context

    def train_step(self) -> Tensor:
        """One step of the optimizer. Returns (loss, gradient norm, loss scale), on the device.

        With shards a fourth number follows: a signal that some process has received, or 0.
        """
        self._fill_inputs()
        row = self.run_step()
        self.step += 1
        return row

    def _fill_inputs(self) -> None:
        """Writes the inputs of the step, which are pure functions of its number."""
        config, n, row = self.config, self.config.grad_accum, 0
        sequences = self.positions.shape[1]
        for shard in self.world.own_range(config.shards):
            for batch in range(self.step * n, (self.step + 1) * n):
                positions = self.train_batches.first_positions(batch)
                self.positions[row].copy_(positions[shard * sequences : (shard + 1) * sequences])
                number = batch * config.shards + shard
                dropouts = number * DROPOUTS_PER_BLOCK * self.model.config.n_layer
                self.seeds[row].fill_((config.seed << 32) + dropouts)
                row += 1
        self.optimizer.lr.fill_(lr_at(self.step, config))
        if config.ema:
            self.optimizer.new_share.fill_(1 - average_decay_at(self.step, config))

    def _run_step(self) -> Tensor:
        """The step on the inputs that are filled in, entirely on the device (see `cuda_graph`)."""
        if self.shards is not None:
            return self._run_shards(self.shards)
        n = self.config.grad_accum
        self.optimizer.zero_grad()
        scale = self.optimizer.scale.clone()
        losses = [self._backward(i) for i in range(n)]
        loss = torch.stack(losses).sum() / n if n > 1 else losses[0]
        norm = self.optimizer.step()
        return torch.stack((loss, norm, scale))

    def _run_shards(self, shards: Shards) -> Tensor:
        """A step whose gradients are the sum of those of all processes' shards."""
        n = self.config.grad_accum
        scale = self.optimizer.scale.clone()
        for k in range(len(shards.own)):
            self.optimizer.zero_grad()
            losses = [self._backward(k * n + i) for i in range(n)]
            loss = torch.stack(losses).sum() / (n * self.config.shards)
            shards.put(k, self.optimizer.gradients(), loss)
        shards.numbers[shards.own.start, 1].copy_(self.signal)
        norm = self.optimizer.step(shards, shards.exchange())
        loss, signal = shards.numbers[:, 0].sum(), shards.numbers[:, 1].max()
        return torch.stack((loss, norm, scale, signal))

    def _backward(self, i: int) -> Tensor:
        """Adds the scaled gradients of forward pass i to those before. Returns its loss."""
        n = self.config.grad_accum * self.config.shards
        scale = self.optimizer.scale / n if n > 1 else self.optimizer.scale
        loss = self._loss(i, scale)
        loss.backward(scale)
        if self.config.grad_accum > 1:
            self.optimizer.accumulate()
        return loss.detach()

    def _loss(self, i: int, scale: Tensor) -> Tensor:
        """Loss of the step's forward pass i, with its dropout seed, for a backward from `scale`."""
        x, y = self.train_batches.sequences_from(self.positions[i])
        with devices.autocast(self.device, self.dtype):
            return self.model.loss(x, y, seed=self.seeds[i], loss_scale=scale)

    def evaluate(
        self, should_continue: Callable[[], bool] = lambda: True, limit: float = math.inf
    ) -> float | None:
        """Mean loss of at most `eval_windows` validation sequences, with the average of the weights
        if one is kept. Training is not affected.

        Returns None if `should_continue`, called before each batch, returns False in any process,
        and infinity once the mean of the first batches is more than MARGIN above the limit.
        """
        batches = evenly_spaced(
            self.val_ids, self.model.config.context, self.eval_batch, self.config.eval_windows
        )
        with self.optimizer.averaged():
            return self._mean_loss(batches, should_continue, limit + MARGIN)

    def evaluate_all(self, should_continue: Callable[[], bool] = lambda: True) -> float | None:
        """Mean loss of the model over the entire validation text: every token is a target once."""
        ids = torch.cat((self._on_device(self.tokens.before_val), self.val_ids))
        batches = every_target(ids, self.model.config.context, self.eval_batch)
        return self._mean_loss(batches, should_continue)

    def _mean_loss(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        should_continue: Callable[[], bool],
        limit: float = math.inf,
    ) -> float | None:
        """Mean loss of the tokens of all batches, without dropout. None if it was stopped; infinity
        once the mean of the first batches is above the limit."""
        self.model.eval()
        context, world = self.model.config.context, self.world
        losses, weights, stopped = [], [], False
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        try:
            with torch.inference_mode(), devices.autocast(self.device, self.dtype):
                for i, (x, y) in enumerate(batches):
                    stopped = stopped or not should_continue()
                    if stopped and world.size == 1:
                        return None
                    weights.append(x.shape[0] * (x.shape[1] / context))  # sequences
                    mine = i % world.size == world.rank and not stopped
                    losses.append(zero + self.model.loss(x, y) * weights[-1] if mine else zero)
                    if limit < math.inf and world.size == 1 and sum(losses) > limit * sum(weights):
                        return math.inf
        finally:
            self.model.train()
        gathered = world.gather(torch.stack([*losses, zero + stopped]).tolist())
        *values, stops = map(sum, zip(*gathered, strict=True))  # one summand of a loss is not 0
        if stops:
            return None
        total = 0.0
        for i, value in enumerate(values):  # in the order of the batches
            total += value
            if total > limit * sum(weights[: i + 1]):
                return math.inf
        return total / sum(weights)

    def _on_device(self, ids: Tensor) -> Tensor:
        """The ids on the device: unchanged on a CPU, int64 on a GPU, or int32 if they are many."""
        if self.device.type == "cpu":
            return ids
        return ids.to(self.device, torch.int64 if ids.numel() < INT32_FROM else torch.int32)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, and the global generators' states."""
        tensors = {**self.optimizer.tensors(), "rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def restore(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Continues at `step` from the result of `optimizer_tensors`.

        Raises KeyError or ValueError if the tensors do not fit the model.
        """
        self.step = step
        if step:
            self.optimizer.restore(tensors)
        else:  # an imported model has no state of an optimizer
            for p, average in self.optimizer.average.items():
                average.copy_(p.detach())
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.separate_generators()

    def separate_generators(self) -> None:
        """Seeds the global generator differently in each process, for builtin's dropout."""
        if self.world.rank:
            numbers = [self.config.seed, self.step, self.world.rank]
            torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))

    def first_nonfinite(self) -> str:
        """Names the next step's first tensor that is not finite: a weight, output or gradient."""
        found: list[str] = []

        def check(what: str, *tensors: Tensor | None) -> None:
            if any(t is not None and not bool(t.isfinite().all()) for t in tensors):
                found.append(what)

        for name, p in self.model.named_parameters():
            check(f"the weight {name}", p)
        names = {module: name for name, module in self.model.named_modules()}

        def record(module: nn.Module, args: object, out: Any) -> None:
            check(f"the output of {names[module]}", *(out if isinstance(out, tuple) else (out,)))

        with register_module_forward_hook(record):
            self._fill_inputs()
            loss = self._loss(0, self.optimizer.scale)
        check("the loss", loss)
        if not found:
            self.optimizer.zero_grad()
            loss.backward(self.optimizer.scale)
            for name, p in reversed(list(self.model.named_parameters())):
                check(f"the gradient of {name}", self.optimizer.gradient(p))
        return found[0] if found else "none in the next step: only the gradients' norm overflows"
