"""Counts the kernel launches and bytes of one training step on fake tensors, which hold no data.

    python -m benchmarks.ledger                         iron in float16, on a T4
    python -m benchmarks.ledger --preset fast --gpus 2  fast, on one of two T4s

For every operation of the step for which a GPU would launch kernels, the ledger counts the launches
and the bytes: of each input, read once, and of each output, written once. Views and allocations
launch no kernels. Nothing is measured and no GPU is needed; the counts were not compared with a
profiler's on a GPU yet. Autocast is that of the CPU, whose list of operations agrees with CUDA's
for this model. The attention of `builtin` counts as PyTorch's memory-efficient attention, which a
T4 runs.
"""

import math
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from irongpt_kernels import Ops, builtin, eager
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import result_file
from benchmarks.presets import model_of
from benchmarks.roofline import matmul_shapes, step_bytes
from irongpt.config import OPTIMIZERS, PRESETS, GPTConfig, TrainConfig
from irongpt.device import DTYPES
from irongpt.model import GPT
from irongpt.training.distributed import World
from irongpt.training.trainer import Trainer

# Operations that launch several kernels; all others launch one. A test counts the launches of our
# ops. For PyTorch's, the numbers are the fewest that its CUDA source allows.
LAUNCHES = {
    "irongpt::causal_attention_backward": 2,  # queries; keys and values. Or one: `launches_of`
    "irongpt::grad_norm": 2,  # squares; their sum, the norm and the scale
    "irongpt::sum_shards": 3,  # the sum; its squares; the norm and the scale
    "irongpt::muon_momentum": 2,  # the momentum and its norm; the normalized update
    "irongpt::embedding_backward": 2,  # rows of each token; their sum, and that of each position
    "irongpt::cross_entropy": 2,  # rows; their mean
    "irongpt::linear_cross_entropy": 5,  # these, and HEAD_MATMULS
    "aten::embedding_dense_backward": 8,  # sorts the ids by radix, segments, sums
    "aten::_index_put_impl_": 8,
    "aten::native_layer_norm_backward": 2,
    "aten::_scaled_dot_product_efficient_attention_backward": 3,  # dO O, its sum, the gradients
}

HEAD_MATMULS = 3  # of linear_cross_entropy: logits, dx, dweight

READ_TWICE = {  # arguments that both kernels of an operation read
    "irongpt::muon_momentum": ("grads", "momentum"),
    "irongpt::embedding_backward": ("g",),
}

GROUPS = {  # parts of an operation's name; the first group that matches counts
    "attention": ("attention",),
    "norms": ("layer_norm", "norm_parameters"),
    "optimizer": ("optimizer", "adamw", "grad_norm", "sum_shards", "muon"),
    "gelu": ("gelu", "tanh", "pow"),
    "loss": ("cross_entropy", "log_softmax", "nll_loss", "gather", "scatter"),
    "batch, embedding": ("embedding", "index"),
    "casts": ("_to_copy",),
    "matmuls": ("mm",),
    "copies, adds": ("copy_", "clone", "add", "stack", "cat"),
}


class Exchanges(World):
    """One of several GPUs. bytes: received from the others in a step; as many are sent to them."""

    def __init__(self, size: int) -> None:
        self.size, self.bytes = size, 0

    def all_gather(self, rows: Tensor) -> None:
        self.bytes += rows.nbytes // self.size * (self.size - 1)

    def reduce_rows(self, rows: Tensor) -> Tensor:
        """Receives its slice of the other rows, then the other slices of the sum."""
        part = -(-rows.shape[1] // self.size)
        others = rows.shape[0] - len(self.own_range(len(rows)))
        self.bytes += part * (others * rows.itemsize + (self.size - 1) * 4)
        return rows.new_zeros(rows.shape[1], dtype=torch.float32)


class Ledger(TorchDispatchMode):
    """Counts the operations dispatched inside it. arch: that of the GPU. phase: if set, the group
    that all of them count in."""

    def __init__(self, arch: int = 75) -> None:
        super().__init__()
        self.arch = arch
        self.phase = ""
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        moved = traffic(func, args, kwargs or {}, out)
        if name == "irongpt::linear_cross_entropy":
            self._head(args[0], args[1], gradient=args[-1])
        elif moved:
            group = self.phase or group_of(name)
            self.launches[group] += launches_of(name, args, self.arch)
            self.bytes[group] += moved
        return out

    def _head(self, x: Tensor, weight: Tensor, gradient: bool) -> None:
        """linear_cross_entropy: its matmuls and its kernels count in separate groups. Its logits
        are internal; a kernel reads them and overwrites them with their gradient."""
        logits, matmuls = len(x) * len(weight) * x.itemsize, HEAD_MATMULS if gradient else 1
        self.launches["matmuls"] += matmuls
        self.bytes["matmuls"] += matmuls * (size(x) + size(weight) + logits)
        self.launches["loss"] += LAUNCHES["irongpt::linear_cross_entropy"] - HEAD_MATMULS
        self.bytes["loss"] += (1 + gradient) * logits + len(x) * 8


def launches_of(name: str, args: Any, arch: int) -> int:
    """The number of kernels that an operation with these arguments launches on an architecture."""
    if name == "irongpt::causal_attention_backward":
        from irongpt_kernels.fused import attention_tiles

        *_, T, D = args[1].shape
        if attention_tiles.default_head_options(arch, T, D, args[1].element_size()):
            return 1
    return LAUNCHES.get(name, 1)


def group_of(name: str) -> str:
    groups = (group for group, parts in GROUPS.items() if any(part in name for part in parts))
    return next(groups, "rest")


def traffic(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operation moves, each operand once; 0 for a view or an allocation."""
    schema = func._schema
    named = {a.name: a for a in schema.arguments}
    given = [*zip(named.values(), args, strict=False), *((named[n], x) for n, x in kwargs.items())]
    short = schema.name.split("::")[1]
    if short.startswith(("empty", "new_empty", "detach", "lift")):
        return 0
    overwrites = short in ("copy_", "fill_", "zero_", "_foreach_copy_")  # their output is not read
    inputs: set[int] = set()
    total = 0
    for a, x in given:
        for t in tensors(x):
            written = a.alias_info is not None and a.alias_info.is_write
            inputs.add(t.untyped_storage()._cdata)
            only_written = overwrites or a.name == "low_precision_params"
            times = 2 if written and not only_written else 1
            times += a.name in READ_TWICE.get(schema.name, ())
            total += times * size(t)
    outputs = [t for t in tensors(out) if t.untyped_storage()._cdata not in inputs]
    if not schema.is_mutable and not outputs:
        return 0  # a view
    return total + sum(size(t) for t in outputs)


def tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def size(t: Tensor) -> int:
    """Bytes of the stored elements: an expanded dimension, whose stride is 0, counts once."""
    stored = (n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)
    return math.prod(stored) * t.element_size()


def _efficient(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, **_: Any) -> Any:
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    return attention(q, k, v, None, True, dropout_p, True)[0]


def _dropout(x: Tensor, p: float) -> Tensor:
    return torch.native_dropout(x, p, True)[0]  # one kernel, as on a GPU


def step(
    ops: Ops,
    dtype: torch.dtype,
    preset: str = "iron",
    vocab_size: int | None = None,
    world: World | None = None,
    arch: int = 75,
    **recipe: Any,
) -> tuple[Ledger, Trainer]:
    """The ledger of one training step, and its trainer, whose tensors have no memory.

    world: an `Exchanges`, for the step of one of several GPUs. arch: that of the GPU.
    """
    model = model_of(preset)
    if vocab_size is not None:
        model = replace(model, vocab_size=vocab_size)
    shards = {"shards": world.size} if world else {}
    train = TrainConfig(**PRESETS[preset].train | recipe | shards)
    ledger = Ledger(arch)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # as in `irongpt train`
    try:
        with (
            FakeTensorMode(),
            patch.object(builtin.F, "scaled_dot_product_attention", _efficient),
            patch.object(builtin.F, "dropout", _dropout),
        ):
            ids = torch.zeros(20 * train.batch_size * model.context, dtype=torch.int64)
            trainer = Trainer(GPT(model, ops), ids, train, torch.device("cpu"), dtype, world)
            optimizer_step = trainer.optimizer.step

            def optimizer_step_in_phase(*args: Any) -> Tensor:
                ledger.phase = "optimizer"
                norm = optimizer_step(*args)
                ledger.phase = ""
                return norm

            trainer._run_step()  # allocates the moments
            if isinstance(world, Exchanges):
                world.bytes = 0
            with patch.object(trainer.optimizer, "step", optimizer_step_in_phase), ledger:
                trainer._run_step()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return ledger, trainer


def least_bytes(config: GPTConfig, train: TrainConfig, itemsize: int) -> Counter[str]:
    """The least bytes of a step by group, with the matmuls, but without those of Muon."""
    shapes = matmul_shapes(config, train.batch_size)
    # Forward, gradient of the input and gradient of the weight each move all three matrices.
    matmuls = 3 * itemsize * sum(n * (M * K + K * N + M * N) for _, n, M, K, N in shapes)
    least = Counter(matmuls=matmuls)
    for op, moved in step_bytes(config, train, itemsize).items():
        least[group_of(op)] += moved
    return least


def show(name: str, ledger: Ledger, least: dict[str, int], groups: bool) -> None:
    """Prints a line for each group, the one that moves most first.

    groups: print also the least bytes of each, which belong to the groups of fused ops.
    """
    print(f"\n{name}: computed, not measured")
    print(f"{'':18}{'launches':>9}{'MB':>10}{'least MB':>10}")
    for group in sorted(ledger.bytes, key=lambda g: -ledger.bytes[g]):
        known = f"{least[group] / 1e6:10.1f}" if groups and group in least else ""
        print(f"{group:18}{ledger.launches[group]:9}{ledger.bytes[group] / 1e6:10.1f}{known}")
    launches, moved = sum(ledger.launches.values()), sum(ledger.bytes.values())
    print(f"{'total':18}{launches:9}{moved / 1e6:10.1f}{sum(least.values()) / 1e6:10.1f}")


def main(argv: list[str] | None = None) -> None:
    parser = result_file.parser("benchmarks.ledger", __doc__)
    help = "model and recipe [iron]"
    parser.add_argument("--preset", choices=list(PRESETS), default="iron", help=help)
    help = "dtype of the matmuls [float16]"
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16", help=help)
    help = "optimizer of the step [the preset's]"
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help=help)
    help = "number of tokens in the vocabulary [the preset's]"
    parser.add_argument("--vocab-size", metavar="N", type=int, help=help)
    archs, help = ("sm_75", "sm_80", "sm_90"), "architecture of the GPU [sm_75]"
    parser.add_argument("--arch", choices=archs, default="sm_75", help=help)
    help = "number of GPUs; the counts are those of one of them [1]"
    parser.add_argument("--gpus", metavar="N", type=int, default=1, help=help)
    args = parser.parse_args(argv)
    from irongpt_kernels import fused

    dtype = DTYPES[args.dtype]
    recipe = {"optimizer": args.optimizer} if args.optimizer else {}
    for name, ops in {"eager": eager, "builtin": builtin, "fused": fused}.items():
        world = Exchanges(args.gpus) if args.gpus > 1 else None
        arch = int(args.arch.removeprefix("sm_"))
        ledger, trainer = step(ops, dtype, args.preset, args.vocab_size, world, arch, **recipe)
        own = replace(trainer.config, batch_size=trainer.config.batch_size // args.gpus, shards=1)
        least = least_bytes(trainer.model.config, own, dtype.itemsize)
        show(f"{name}, {args.dtype}", ledger, least, name == "fused")
        if world:
            print(f"exchange: {world.bytes / 1e6:.1f} MB from the other GPUs, and as much to them")


if __name__ == "__main__":
    main()
