"""What is timed: every op at the model's own shape, then along sweeps, and what it costs at least.

The model is iron on a GPU, nano on a CPU. Weights are float32 and so is the residual stream, which
layer_norm and dropout_add_layer_norm take, as in a training under autocast; all else is of the
case's dtype. The sweep over T keeps the tokens: a longer context has a smaller batch. Ops without a
gradient are in `updates`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import inplace_ops
from irongpt.config import WAR_AND_PEACE_VOCAB
from irongpt.device import dtype_name

MODES = ("forward", "backward", "both")
WHOLE = ("both", "call")  # modes that are all of an op, with a gradient and without
FLOAT32 = ("layer_norm", "embed_tokens")  # the residual stream alone
DROPS = ("causal_attention", "causal_attention_packed", "dropout_add_layer_norm")
OPS = (
    "causal_attention_packed",
    "causal_attention",
    "softmax",
    "layer_norm",
    "dropout_add_layer_norm",
    "gelu",
    "cross_entropy",
    *inplace_ops.OPS,
)

Inputs = dict[str, Tensor]


def modes(op: str) -> tuple[str, ...]:
    """What of an op is timed; the last one is all of it."""
    return ("call",) if op in inplace_ops.OPS else MODES


@dataclass(frozen=True)
class Shape:
    """Of a model and its batch. Rows are B T, their width is H D."""

    B: int = 64
    H: int = 6
    T: int = 256
    D: int = 64
    V: int = WAR_AND_PEACE_VOCAB
    L: int = 6


IRON = Shape()
NANO = Shape(B=16, H=4, T=64, D=32, L=4)
OWN = ("iron", "nano")  # series of a model's own shape
GATE = 1 << 25  # elements of a T x T matrix, at most, at which an op is checked


@dataclass(frozen=True)
class Case:
    """An op at a shape. sweep: which series it belongs to; one of OWN for the model's own shape.

    p: of dropout; of a draw the temperature. At 0 nothing is random.
    """

    op: str
    sweep: str
    shape: Shape
    dtype: torch.dtype
    p: float = 0.0

    @property
    def name(self) -> str:
        dropout = f" p={self.p:g}" if self.op in DROPS else ""
        return f"{self.op} {self.size} {dtype_name(self.dtype)}{dropout}"

    @property
    def modes(self) -> tuple[str, ...]:
        return modes(self.op)

    @property
    def size(self) -> str:
        if self.op in inplace_ops.OPS:
            return inplace_ops.size(self)
        s = self.shape
        rows = f"{s.B * s.T}x"
        return {
            "causal_attention": f"B={s.B} H={s.H} T={s.T} D={s.D}",
            "causal_attention_packed": f"B={s.B} H={s.H} T={s.T} D={s.D}",
            "softmax": f"{s.B}x{s.H}x{s.T}x{s.T}",
            "layer_norm": f"{rows}{s.H * s.D}",
            "dropout_add_layer_norm": f"{rows}{s.H * s.D}",
            "gelu": f"{rows}{4 * s.H * s.D}",
            "cross_entropy": f"{rows}{s.V}",
        }[self.op]

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        """Standard normal, the weights around 1. Those that are floating want gradients, if the op
        has any."""
        generator = torch.Generator(device).manual_seed(seed)
        s = self.shape
        M, N = s.B * s.T, s.H * s.D
        differentiable = self.op not in inplace_ops.OPS

        def randn(*size: int, dtype: torch.dtype = self.dtype) -> Tensor:
            x = torch.randn(size, generator=generator, device=device)
            return x.to(dtype).requires_grad_(differentiable)

        if not differentiable:
            return inplace_ops.inputs(self, randn, device)

        def weight() -> Tensor:
            return (1 + 0.1 * randn(N, dtype=torch.float32)).detach().requires_grad_()

        def targets() -> Tensor:
            return torch.randint(s.V, (M,), generator=generator, device=device)

        heads = (s.B, s.H, s.T, s.D)
        make: dict[str, Callable[[], Inputs]] = {
            "causal_attention": lambda: {name: randn(*heads) for name in "qkv"},
            "causal_attention_packed": lambda: {"qkv": randn(s.B, s.T, 3, s.H, s.D)},
            "softmax": lambda: {"x": randn(s.B, s.H, s.T, s.T)},
            "layer_norm": lambda: {"x": randn(M, N, dtype=torch.float32), "weight": weight()},
            "dropout_add_layer_norm": lambda: {
                "branch": randn(M, N),
                "residual": randn(M, N, dtype=torch.float32),
                "weight": weight(),
            },
            "gelu": lambda: {"x": randn(M, 4 * N)},
            "cross_entropy": lambda: {"logits": randn(M, s.V), "targets": targets()},
        }
        return make[self.op]()

    def options(self, device: torch.device) -> dict[str, Any]:
        """The op's other arguments. The seed is on the device, as in a training step."""
        if self.op == "softmax":
            return dict(scale=self.shape.D**-0.5, causal=True)
        if self.op not in DROPS:
            return {}
        return dict(dropout_p=self.p, seed=torch.full((), inplace_ops.SEED, device=device))

    def small(self) -> "Case":
        """The same op where float64 and T x T matrices fit: fewer heads and windows."""
        s = self.shape
        if self.op in inplace_ops.OPS:
            return self
        if self.op in ("causal_attention", "causal_attention_packed", "softmax"):
            heads = max(1, min(s.B * s.H, GATE // s.T**2))
            H = min(s.H, heads)
            return replace(self, shape=replace(s, B=max(1, heads // H), H=H))
        width = s.V if self.op == "cross_entropy" else 4 * s.H * s.D
        return replace(self, shape=replace(s, B=max(1, min(s.B, GATE // (s.T * width)))))

    def cost(self, mode: str) -> tuple[int, int] | None:
        """Least bytes across DRAM and FLOPs, by the kernels' own cost functions.

        None without Triton, which the kernels' modules import.
        """
        try:
            if self.op in inplace_ops.OPS:
                return inplace_ops.cost(self)
            one = {"forward": "fwd", "backward": "bwd"}
            parts = [self._cost(one[m]) for m in (one if mode == "both" else [mode])]
        except ImportError:
            return None
        return sum(p[0] for p in parts), sum(p[1] for p in parts)

    def _cost(self, mode: str) -> tuple[int, int]:
        from irongpt_kernels.fused import attention
        from irongpt_kernels.fused.cross_entropy import cross_entropy_bytes
        from irongpt_kernels.fused.dropout_add_layer_norm import dropout_add_layer_norm_bytes
        from irongpt_kernels.fused.gelu import gelu_bytes
        from irongpt_kernels.fused.layer_norm import layer_norm_bytes
        from irongpt_kernels.fused.softmax import softmax_bytes

        s, size = self.shape, self.dtype.itemsize
        M, N, backward = s.B * s.T, s.H * s.D, mode == "bwd"
        if self.op.startswith("causal_attention"):
            flops = attention.causal_attention_flops(s.B, s.H, s.T, s.D, mode)
            return attention.causal_attention_bytes(s.B, s.H, s.T, s.D, size, mode), flops
        moved: dict[str, Callable[[], int]] = {
            "softmax": lambda: softmax_bytes(s.B * s.H * s.T, s.T, size, mode, True),
            "layer_norm": lambda: layer_norm_bytes(M, N, 4, backward),
            "dropout_add_layer_norm": lambda: dropout_add_layer_norm_bytes(M, N, size, 4, backward),
            "gelu": lambda: gelu_bytes(M, 4 * N, size, mode),
            "cross_entropy": lambda: cross_entropy_bytes(M, s.V, size, mode),
        }
        return moved[self.op](), 0


def upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients from above: one for each output."""
    found = []
    for i, x in enumerate(outputs):
        generator = torch.Generator(x.device).manual_seed(90 + i)
        g = torch.randn(x.shape, generator=generator, device=x.device)
        found.append(g.to(x.dtype))
    return found


def own_cases(gpu: bool, dtypes: list[torch.dtype], dropout_off: bool = True) -> list[Case]:
    """Every op at the model's own shape, with dropout as `iron` and, if told, without as `fast`.

    Ops whose tensors are float32 in any training come once.
    """
    name, shape = ("iron", IRON) if gpu else ("nano", NANO)
    return [
        Case(op, name, replace(shape, B=1) if op in inplace_ops.TOKEN else shape, dtype, p)
        for dtype in dtypes
        for op in OPS
        if op not in FLOAT32 or dtype == dtypes[0]
        for p in ((0.2, 0.0) if op in DROPS and dropout_off else (dropping(op),))
    ]


def dropping(op: str) -> float:
    """As the iron model has it, where an op is random."""
    return inplace_ops.TEMPERATURE if op == "sample_tokens" else 0.2 if op in DROPS else 0.0


SWEEPS = ("T", "D", "batch", "width", "V")
Sizes = dict[str, tuple[int, ...]]  # by sweep; of `width`, heads
ON_GPU: Sizes = {
    "T": (64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "D": (16, 32, 64, 96, 128),
    "batch": (8, 16, 32, 128, 256),
    "width": (12, 16, 32, 64),  # 768 to 4096 columns
    "V": (1024, 8192, 50257),
}
ON_CPU: Sizes = {
    "T": (64, 128, 256, 512),
    "D": (16, 64),
    "batch": (4,),
    "width": (12,),
    "V": (1024,),
}


def sweep_cases(
    gpu: bool, dtypes: list[torch.dtype], names: tuple[str, ...] = SWEEPS
) -> Iterator[Case]:
    """Over T, head dimension, batch, width and vocabulary, one at a time; attention with dropout
    and without. What is float32 in any training comes once. Without a GPU a few."""
    base, sizes = (IRON, ON_GPU) if gpu else (NANO, ON_CPU)
    for dtype in dtypes:
        found = {
            "T": _over_t(base, dtype, sizes["T"]),
            "D": _attention("D", dtype, [replace(base, D=D) for D in sizes["D"]]),
            "batch": _over_batch(base, dtype, sizes["batch"]),
            "width": [
                Case(op, "width", replace(base, H=H), dtype, dropping(op))
                for H in sizes["width"]
                for op in ("layer_norm", "dropout_add_layer_norm", "gelu")
            ],
            "V": [Case("cross_entropy", "V", replace(base, V=V), dtype) for V in sizes["V"]],
        }
        for name in names:
            for case in found[name]:
                if case.op not in FLOAT32 or dtype == dtypes[0]:
                    yield case


def _attention(sweep: str, dtype: torch.dtype, shapes: list[Shape]) -> list[Case]:
    return [Case("causal_attention", sweep, s, dtype, p) for s in shapes for p in (0.0, 0.2)]


def _over_t(base: Shape, dtype: torch.dtype, lengths: tuple[int, ...]) -> list[Case]:
    tokens = base.B * base.T
    shapes = [replace(base, T=T, B=max(1, tokens // T)) for T in lengths]
    packed = [Case("causal_attention_packed", "T", s, dtype, 0.2) for s in shapes]
    return [
        *_attention("T", dtype, shapes),
        *packed,
        *(Case("softmax", "T", s, dtype) for s in shapes),
        *(Case("decode_attention", "T", replace(base, B=1, T=T), dtype) for T in lengths),
    ]


def _over_batch(base: Shape, dtype: torch.dtype, sizes: tuple[int, ...]) -> list[Case]:
    """All ops that have rows: what changes is their number. Of one token, for a few texts."""
    shapes = [replace(base, B=B) for B in sizes]
    others = [op for op in OPS if op != "causal_attention" and op not in inplace_ops.OPS]
    texts = [replace(base, B=B) for B in (4, 8, 64)]
    return [
        *_attention("batch", dtype, shapes),
        *(Case(op, "batch", s, dtype, dropping(op)) for op in others for s in shapes),
        *(Case(op, "batch", s, dtype, dropping(op)) for op in inplace_ops.TOKEN for s in texts),
    ]
