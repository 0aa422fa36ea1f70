"""The benchmarked cases: every op of `op_specs` at the model's shape, then along sweeps.

The model is iron on a GPU, nano on a CPU. dtypes are those of training under autocast: weights
and the residual stream are float32, all else has the case's dtype. The sweep over T keeps the
number of tokens, so a longer context has a smaller batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from irongpt_kernels import op_inputs
from irongpt_kernels.op_inputs import SEED, Shape
from irongpt_kernels.op_specs import SPECS, TOKEN, OpSpec
from torch import Tensor

from irongpt import device as devices
from irongpt.training import muon

MODES = ("forward", "backward", "total")
TOTAL = ("total", "call")  # the modes of a complete op
OPS = tuple(SPECS)
WITH_DROPOUT = tuple(op for op, spec in SPECS.items() if spec.dropout)
AS_EAGER = ("embed_tokens", "linear_add", "sample_tokens")  # ops that builtin takes from eager
FLOAT32 = tuple(op for op, spec in SPECS.items() if spec.float32_only())

IRON = Shape()
NANO = Shape(B=16, H=4, T=64, D=32, L=4)
MODEL_SHAPES = ("iron", "nano")  # sweep names of the cases at the shape of a model
DROPOUT = 0.2  # of the iron preset
TEMPERATURE = 0.8
CHECKED = 1 << 25  # the most elements of a tensor at which an op is checked

Inputs = dict[str, Tensor]


def modes(op: str) -> tuple[str, ...]:
    """The modes in which an op is timed; the last one is the total."""
    return MODES if SPECS[op].differentiable else ("call",)


@dataclass(frozen=True)
class Case:
    """An op at a shape. sweep: its series, one of MODEL_SHAPES at the shape of a model.

    p: dropout, or the temperature of sample_tokens. At 0 nothing is random.
    """

    op: str
    sweep: str
    shape: Shape
    dtype: torch.dtype
    p: float = 0.0

    @property
    def spec(self) -> OpSpec:
        return SPECS[self.op].for_sweep(self.sweep) or SPECS[self.op]

    @property
    def name(self) -> str:
        dropout = f" p={self.p:g}" if self.spec.dropout else ""
        return f"{self.op} {self.size} {devices.dtype_name(self.dtype)}{dropout}"

    @property
    def modes(self) -> tuple[str, ...]:
        return modes(self.op)

    @property
    def size(self) -> str:
        return self.spec.size(self.shape)

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        """Random inputs. The floating ones require gradients if the op has any."""
        dtypes = op_inputs.dtypes(self.dtype, update=muon.matmul_dtype(self.dtype, device))
        tensors = op_inputs.random_inputs(self.spec.inputs(self.shape), dtypes, device, seed)
        for x in tensors.values():
            x.requires_grad_(self.spec.differentiable and x.is_floating_point())
        return tensors

    def options(self, device: torch.device) -> dict[str, Any]:
        """The op's other arguments. The seed is on the device, as in a training step."""
        return self.spec.options(self.shape, self.p, torch.full((), SEED, device=device))

    def small(self) -> "Case":
        """The same op, with so few heads and sequences that float64 and T x T matrices fit."""
        s = self.shape
        if not self.spec.differentiable:
            return self
        if self.spec.scores:
            heads = max(1, min(s.B * s.H, CHECKED // s.T**2))
            H = min(s.H, heads)
            return replace(self, shape=replace(s, B=max(1, heads // H), H=H))
        width = s.V if "cross_entropy" in self.op else 4 * s.width
        return replace(self, shape=replace(s, B=max(1, min(s.B, CHECKED // (s.T * width)))))

    def cost(self, mode: str) -> tuple[int, int]:
        """Least bytes across DRAM, and FLOPs."""
        backward = {"backward": [True], "total": [False, True]}.get(mode, [False])
        parts = [self.spec.cost(self.shape, self.dtype.itemsize, 4, b) for b in backward]
        return sum(p.bytes for p in parts), sum(p.flops for p in parts)


def dtypes_of(device: torch.device) -> list[torch.dtype]:
    """The 16-bit dtypes of a GPU, the one that it trains in first, then float32."""
    first = devices.precision("auto", device).dtype
    second = [torch.float16] if first == torch.bfloat16 else []
    return list(dict.fromkeys([first, *second, torch.float32]))


def cases_of(device: torch.device, quick: bool = False, swept: tuple[str, ...] = ()) -> list[Case]:
    """Every op at the model's shape in every dtype, with iron's dropout and without; then the
    sweeps in 16 bits. Ops whose tensors are always float32 come once.

    quick: only the 16-bit dtype that this GPU trains in, and only with iron's dropout.
    """
    gpu, dtypes = device.type == "cuda", dtypes_of(device)
    if quick:
        dtypes = list(dict.fromkeys([dtypes[0], torch.float32]))
    name, shape = ("iron", IRON) if gpu else ("nano", NANO)
    cases = [
        Case(op, name, replace(shape, B=1) if spec in TOKEN else shape, dtype, p)
        for dtype in dtypes
        for op, spec in SPECS.items()
        if op not in FLOAT32 or dtype == dtypes[0]
        for p in ((DROPOUT, 0.0) if spec.dropout and not quick else (default_p(op),))
    ]
    in_16_bits = [dtype for dtype in dtypes if dtype.itemsize == 2]
    return cases + list(sweep_cases(gpu, in_16_bits or dtypes, swept))


def default_p(op: str) -> float:
    """`Case.p` by default: iron's dropout, the temperature of sample_tokens, else 0."""
    return TEMPERATURE if op == "sample_tokens" else DROPOUT if SPECS[op].dropout else 0.0


SWEEPS = ("T", "D", "batch", "width", "V")
Sizes = dict[str, tuple[int, ...]]  # by sweep; those of `width` are numbers of heads
ON_GPU: Sizes = {
    "T": (64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "D": (16, 32, 64, 96, 128),
    "batch": (8, 16, 32, 128, 256),
    "width": (12, 16, 32, 64),  # 768 to 4096 columns
    "V": (4096, 8192, 16384, 50304),
}
ON_CPU: Sizes = dict(T=(64, 128, 256, 512), D=(16, 64), batch=(4,), width=(12,), V=(4096,))


def sweep_cases(
    gpu: bool, dtypes: list[torch.dtype], names: tuple[str, ...] = SWEEPS
) -> Iterator[Case]:
    """Over T, head dimension, batch, width and vocabulary, one at a time; causal_attention with
    dropout and without. Ops that are always float32 come once. On a CPU a few sizes."""
    base, sizes = (IRON, ON_GPU) if gpu else (NANO, ON_CPU)
    for dtype in dtypes:
        for sweep in names:
            for op, spec in SPECS.items():
                if spec.for_sweep(sweep) is None or (op in FLOAT32 and dtype != dtypes[0]):
                    continue
                for shape in _swept(sweep, spec, base, sizes[sweep]):
                    for p in (0.0, DROPOUT) if op == "causal_attention" else (default_p(op),):
                        yield Case(op, sweep, shape, dtype, p)


def _swept(sweep: str, spec: OpSpec, base: Shape, sizes: tuple[int, ...]) -> list[Shape]:
    """The one-token ops are swept over a few sequences, and over T and V with one."""
    if sweep == "T":
        return [replace(base, T=T, B=1 if spec in TOKEN else max(1, base.rows // T)) for T in sizes]
    if sweep == "batch":
        return [replace(base, B=B) for B in ((4, 8, 64) if spec in TOKEN else sizes)]
    if spec in TOKEN:
        base = replace(base, B=1)
    return [replace(base, **{"H" if sweep == "width" else sweep: n}) for n in sizes]
