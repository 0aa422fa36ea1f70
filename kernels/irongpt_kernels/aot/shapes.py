"""The shapes at which `aot` compiles the ops: at least one for each choice of tiles and warps, and
for each specialization.

An op without shapes in this file is compiled at those of the preset iron of the GPT.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from irongpt_kernels import op_inputs
from irongpt_kernels.op_inputs import RowShape, Shape, Tensors
from irongpt_kernels.op_specs import SPECS, OpSpec

DTYPES = dict(float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16)
IRON = Shape()  # reported costs are for this batch
CONTEXT = IRON.T
SEQUENCES = 2  # the batch size of the ops of a decoding step, and of the embedding
ROWS = 48  # rows of the tensors: a multiple of 16, as in any real model
SAMPLING: dict[str, dict[str, Any]] = {
    "all tokens": {}, "greedy": dict(temperature=0.0), "top-k, top-p": dict(top_k=20, top_p=0.9)
}  # fmt: skip
VOCABULARIES = (IRON.V, 4096, 8192, 50257, 50304)  # 50,257 is GPT-2's, which no tile divides
WIDTHS = [16, 32, 64, 128, 256, 384, 768, 1024, 2048, 4096, 8192]  # of rows in registers


def dtypes(spec: OpSpec, dtype: str) -> op_inputs.Dtypes:
    """As `op_inputs.dtypes`, with two exceptions: weights have the compute dtype in ops that have a
    gradient, and so has the input x of layer_norm."""
    compute = DTYPES[dtype]
    roles = dict(weight=compute) if spec.differentiable else {}
    roles |= dict(stream=compute) if spec.name == "layer_norm" else {}
    return op_inputs.dtypes(compute, **roles)


@dataclass(frozen=True)
class Case:
    """A call of an op, forward and backward.

    label: how a report names the shape. at: the model and its batch. p: dropout, or the temperature
    of sample_tokens. omitted: names of optional inputs that are left out. sizes: for some inputs,
    by name, a size in place of the one that follows from `at`. costs: the shape whose cost is
    reported, if it is another one. bytes: the least bytes, if they do not follow from the shape.
    """

    spec: OpSpec
    label: str
    dtype: str
    at: Shape = IRON
    p: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    omitted: tuple[str, ...] = ()
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    costs: Shape | None = None
    bytes: int | None = None

    @property
    def op(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> str:
        return f"{self.label} {self.dtype}"

    def wanted(self) -> dict[str, op_inputs.Input]:
        """The inputs, with the optional ones that are not `omitted`."""
        return {
            n: replace(x, size=self.sizes.get(n, x.size), optional=False)
            for n, x in self.spec.inputs(self.at).items()
            if n not in self.omitted and not (x.copy_of and self.dtype == "float32")
        }

    def inputs(self) -> Tensors:
        """Tensors of zeros, or of valid indices."""
        kinds, made = dtypes(self.spec, self.dtype), dict[str, Tensor]()
        for name, one in self.wanted().items():
            made[name] = torch.zeros(one.size, dtype=kinds[one.role])
            if one.below:
                made[name] = op_inputs.indices(one)
            elif one.role == "integer" and one.values:
                made[name] = one.values(made[name])
        return made

    def results(
        self,
        ops: Any,
        inputs: Tensors,
        upstream: Callable[[int, Tensor], Tensor] = lambda i, x: torch.ones_like(x),
        seed: int = 1,
    ) -> Tensors:
        """Outputs by name or number, and the gradient of each floating input, if the op has one,
        under the name "d NAME"."""
        options = self.spec.options(self.at, self.p, seed) | self.options

        def call(x: Tensors) -> tuple[Tensor, ...]:
            return self.spec.run(ops, self.at, x, **options)

        if self.spec.differentiable:
            return op_inputs.results(call, inputs, self.spec.outputs, upstream)
        return {str(i): x for i, x in enumerate(call(inputs))}

    def cost(self, backward: bool) -> tuple[int, int]:
        """Least bytes and FLOPs."""
        itemsize = DTYPES[self.dtype].itemsize
        stream = itemsize if self.op == "layer_norm" else 4
        cost = self.spec.cost(self.costs or self.at, itemsize, stream, backward)
        return cost if self.bytes is None else (self.bytes, 0)


def every(arch: int) -> list[Case]:
    """All shapes for an architecture: every dtype that it computes in, every tile."""
    names = [n for n in DTYPES if n != "bfloat16" or arch >= 80]
    return [case for name in names for case in _cases(name)]


def representative(arch: int) -> list[Case]:
    """The cases that a test can afford: each kernel in one dtype at least, attention at several
    head dimensions, on sm_75 and sm_80 with some that are padded in registers. Float32 attention
    has few of them: LLVM takes long to compile its scalar dots."""
    attention = {  # sm_80 and sm_90 have the same float32 tiles: each compiles another D
        75: ["D=(32|48|80|96) p=0.2 T=256 float16", "D=(32|64) p=0.0 T=256 float16",
             "D=64 p=0.2 T=250 float16", "D=(16|128) p=0.2 T=256 float32"],
        80: ["D=32 p=0.0 T=256 float16", "D=80 p=0.2 T=256 float32"],
        90: ["D=32 p=0.0 T=256 float16", "D=32 p=0.2 T=256 float32"],
    }  # fmt: skip
    chosen = [
        *attention[arch], "D=(64|128) p=0.2 T=256 float16", "D=64 p=0.2 T=512 float16",
        "D=64 p=0.2 T=256 bfloat16", "N=384 p=0.2 .*", "N=(4096|8192) p=0.2 float16",
        "N=(384|1536|20000|256 causal) float16", "N=384 (gradients|matrices) .*",
        "V=(104|4096|16384|50257) float16", "V=104 (all tokens|top-k, top-p) float16",
        "D=64 N=256 float16", "D=128 N=256 float32", "K=384 N=1152 gelu float16",
        "K=1536 N=384 float16", "C=384 float32", "iron float16",
    ]  # fmt: skip
    return [case for case in every(arch) if re.fullmatch("|".join(chosen), case.shape)]


def _cases(dtype: str) -> Iterator[Case]:
    for spec in SPECS.values():
        for more in _shapes(spec.name, dtype):
            fields: dict[str, Any] = dict(spec=spec, dtype=dtype) | more
            yield Case(**fields)


def _rows(N: int) -> dict[str, Shape]:
    """Shapes of an op on a (ROWS, N) matrix. Its cost is reported for as many rows as iron's batch
    has."""
    return dict(at=RowShape(V=N, M=ROWS, N=N), costs=RowShape(V=N, M=IRON.rows, N=N))


def _shapes(op: str, dtype: str) -> Iterator[dict[str, Any]]:
    """The fields of each case of an op."""
    match op:
        case "causal_attention":
            for D in range(16, 129, 16):
                # 250: no tile divides it, so loops are masked throughout.
                # 512: on sm_90 the backward of more than 256 positions is the pair of kernels.
                extra = [(250, 0.2), (2 * CONTEXT, 0.2)] if D == 64 else []
                for T, p in [(CONTEXT, 0.2), (CONTEXT, 0.0), *extra]:
                    at = Shape(B=1, H=2, T=T, D=D)
                    yield dict(label=f"D={D} p={p} T={T}", at=at, costs=Shape(D=D), p=p)
        case "causal_attention_packed":  # has the kernels of causal_attention
            return
        case "layer_norm":
            for N in WIDTHS:
                yield dict(label=f"N={N}", **_rows(N))
            yield dict(label="N=384 no bias", omitted=("bias",), **_rows(384))
        case "dropout_add_layer_norm":
            for N, p in itertools.product(WIDTHS, (0.0, 0.2)):
                yield dict(label=f"N={N} p={p}", p=p, **_rows(N))
        case "embed_layer_norm":
            yield dict(label=f"C={IRON.width}", at=Shape(B=SEQUENCES), costs=IRON)
        case "softmax":
            scale = dict(scale=1.0)
            at = Shape(B=1, H=1)
            yield dict(label=f"N={CONTEXT} causal", at=at, costs=IRON, options=scale)
            for N in (384, 16384, 20_000):
                full = SPECS[op].full_rows
                yield dict(spec=full, label=f"N={N}", options=scale, **_rows(N))
        case "cross_entropy":
            for V in VOCABULARIES:
                yield dict(label=f"V={V}", **_rows(V))
        case "linear_cross_entropy":  # a narrow layer: its matmuls are not ours
            for V in (*VOCABULARIES, 16384):
                at = RowShape(V=V, M=ROWS, N=16)
                options = dict(loss_scale=torch.tensor(2.0))  # as in a training step
                yield dict(label=f"V={V}", at=at, costs=replace(IRON, V=V), options=options)
        case "gelu":
            label = f"N={4 * IRON.width}"
            yield dict(label=label, **_rows(IRON.width))
            yield dict(label=f"{label} no bias", omitted=("bias",), **_rows(IRON.width))
        case "adamw" | "muon":
            what = dict(adamw="gradients", muon="matrices")[op]
            growth = dict(growth_interval=2000 if dtype == "float16" else 0)
            yield dict(label=f"N={IRON.width} {what}", options=growth)
        case "decode_attention":
            for D in range(16, 129, 16):
                at = Shape(B=SEQUENCES, D=D)
                yield dict(label=f"D={D} N={CONTEXT}", at=at, costs=Shape(B=1, D=D))
        case "norm_linear":
            for V in VOCABULARIES[1:]:  # the head, which has no GELU
                sizes = dict(norm_weight=(IRON.width,))
                more = _linear(IRON.width, V, dtype, sizes)
                more |= dict(options=dict(gelu=False), omitted=("norm_bias", "bias"))
                yield dict(label=f"K={IRON.width} N={V}", **more)
            for K, N in [(16, 16), (384, 1152), (384, IRON.V), (1024, 4096), (4096, 1024)]:
                sizes = dict.fromkeys(("norm_weight", "norm_bias"), (K,)) | dict(bias=(N,))
                for gelu, omitted in ((False, ("norm_bias", "bias")), (True, ())):
                    label = f"K={K} N={N}{' gelu' if gelu else ''}"
                    more = _linear(K, N, dtype, sizes) | dict(omitted=omitted)
                    yield dict(label=label, options=dict(gelu=gelu), **more)
        case "linear_add":
            for K, N in [(16, 16), (384, 384), (1536, 384), (4096, 1024)]:
                more = _linear(K, N, dtype, dict(residual=(SEQUENCES, N)))
                yield dict(label=f"K={K} N={N}", omitted=("bias",), **more)
        case "sample_tokens":
            for V in VOCABULARIES:
                at, costs = Shape(B=SEQUENCES, V=V), Shape(B=1, V=V)
                for what, limits in SAMPLING.items():
                    options = dict(temperature=1.0, top_k=None) | limits
                    yield dict(label=f"V={V} {what}", at=at, costs=costs, options=options)
        case "embed_tokens":
            if dtype == "float32":
                for V in VOCABULARIES:
                    label = f"C={IRON.width}" + (f" V={V}" if V != IRON.V else "")
                    yield dict(label=label, at=Shape(B=SEQUENCES, V=V), costs=Shape(B=1))
        case _:
            yield dict(label="iron")


def _linear(K: int, N: int, dtype: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes and the least bytes of a `Case` with an (N, K) weight. sizes: those of further
    inputs."""
    sizes = sizes | dict(x=(SEQUENCES, K), weight=(N, K))
    return dict(sizes=sizes, bytes=N * K * DTYPES[dtype].itemsize)
