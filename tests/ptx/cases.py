"""Calls of every op of the op table, executed from compiled PTX and compared with eager.

The ops, their inputs and their calls come from `irongpt_kernels.op_specs`, most shapes from
`irongpt_kernels.aot.shapes`, the layouts of inputs from `numerics`.
"""

import math
import mmap
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from irongpt_kernels import eager, op_inputs, tolerance
from irongpt_kernels.aot import shapes, tiles
from irongpt_kernels.op_inputs import RowShape, Tensors
from irongpt_kernels.op_specs import LAYERS, SPECS, TOKEN
from irongpt_kernels.ptx.driver import emulating
from irongpt_kernels.runtime import launch_table
from torch import Tensor
from triton.runtime.errors import OutOfResources

from tests.helpers.numerics import LAYOUTS
from tests.helpers.poison import poison

CPU = torch.device("cpu")
SEED = 2**33 + 5  # uses both halves of the generator's key
DROPOUT_P = 0.2


@dataclass(frozen=True)
class Case(shapes.Case):
    """One call of an op. scale: a factor of the inputs. table: launch options in place of the
    default ones."""

    layout: str = "contiguous"
    scale: float = 1.0
    table: launch_table.Table = field(default_factory=dict)

    @property
    def name(self) -> str:
        layout = "" if self.layout == "contiguous" else f", {self.layout}"
        return f"{self.spec.name} {self.label}{layout}"

    def inputs(self) -> Tensors:
        wanted = self.wanted()
        made = op_inputs.random_inputs(wanted, shapes.dtypes(self.spec, self.dtype), CPU)
        for name, one in wanted.items():
            if one.below:
                made[name] = op_inputs.indices(one, ignored=one.size[0] > 4)
            elif name in made and made[name].is_floating_point() and made[name].dim() > 1:
                made[name] *= self.scale
                if "expanded" not in self.layout:  # equal rows are for upstream gradients
                    made[name] = self.laid_out(made[name])
        return made

    def laid_out(self, x: Tensor) -> Tensor:
        return (LAYOUTS | FAR).get(self.layout, lambda x: x)(x)

    def upstream(self, i: int, x: Tensor) -> Tensor:
        g = op_inputs.normal(tuple(x.shape), 90 + i).to(x.dtype)
        return self.laid_out(g) if self.layout in LAYOUTS and x.dim() > 1 else g

    def run(self, ops: Any, inputs: Tensors) -> Tensors:
        """The results of `ops`. The inputs stay as they are."""
        copies = {n: x if self.spec.differentiable else x.clone() for n, x in inputs.items()}
        return self.results(ops, copies, self.upstream, SEED)


@dataclass
class Result:
    """What the execution of a case found. share: the largest error over the tolerance. seconds: of
    the CPU, compilers included."""

    share: float = 0.0
    problems: list[str] = field(default_factory=list)
    launches: int = 0
    instructions: int = 0  # of warps
    seconds: float = 0.0


def execute(case: Case, arch: int, **options: Any) -> Result:
    """Runs a case's kernels from their PTX for sm_{arch}; options: see `ptx.execute.Options`."""
    from irongpt_kernels import fused

    start, result, inputs = time.process_time(), Result(), case.inputs()
    launch_table.use(CPU, case.table)
    try:
        with emulating(arch, **options) as report, poison():
            found = case.run(fused, inputs)
    except OutOfResources as e:
        if not case.table:  # `irongpt tune` leaves out tiles that do not fit into shared memory
            result.problems.append(str(e))
    except Exception as e:
        result.problems.append(f"{type(e).__name__}: {' '.join(str(e).split())[:400]}")
    else:
        compare(case, result, found, inputs)
        result.problems += report.lines()
        result.launches, result.instructions = report.launches, report.instructions
    finally:
        launch_table.use(CPU, {})
    result.seconds = round(time.process_time() - start, 2)
    return result


def compare(case: Case, result: Result, found: Tensors, inputs: Tensors) -> None:
    """With eager, by the tolerance."""
    base, oracle = (case.run(eager, x) for x in (inputs, op_inputs.widened(inputs)))
    for message, share in differences(found, base, oracle):
        result.share = max(result.share, share)
        result.problems += [message] * (share > 1)


def differences(found: Tensors, base: Tensors, oracle: Tensors) -> Iterator[tuple[str, float]]:
    """Each error in words, and its share of the tolerance. It is infinite for another dtype or
    shape, for integers that are not equal, and for other places of infinities and NaN."""
    for name, x in found.items():
        y, z = base[name], oracle[name]
        if x.dtype != y.dtype or x.shape != y.shape:
            yield f"{name} is {x.dtype} {tuple(x.shape)}", math.inf
        elif not x.is_floating_point():
            if differ := int((x != y).sum()):
                yield f"{differ} elements of {name} differ from eager's", math.inf
        elif x.numel():
            if not torch.equal(x.isfinite(), z.isfinite()):
                yield f"{name} is not finite in the same places as eager's", math.inf
            factor = tolerance.GRADIENTS if name.startswith("d ") else tolerance.OUTPUTS
            for norm, e in tolerance.errors(factor, x, y, z).items():
                message = f"{name}: {norm} error {e.candidate:.3g}, tolerance {e.bound:.3g}"
                yield f"{message}, eager's {e.eager:.3g}", e.share


# The sets of cases -------------------------------------------------------------------------------


def dtypes(arch: int) -> list[str]:
    return ["float16", "float32", *(["bfloat16"] if arch >= 80 else [])]


def sample(dtype: str, arch: int) -> Iterator[Case]:
    """Every op once, attention at several tiles. float32 attention takes the compiler long for
    larger heads."""
    at = RowShape(1, 1, 90, 16 if dtype == "float32" else 64, V=109, L=1, M=7, N=200)
    for spec in SPECS.values():
        p = 1.0 if spec.name == "sample_tokens" else DROPOUT_P
        if spec.kind == "optimizer":
            few = replace(at, N=48)
            yield Case(spec, "few weights", dtype, few, p, dict(growth_interval=4))
        else:
            yield Case(spec, spec.size(at), dtype, at, p)


LENGTHS = {  # a row of few elements, a partial tile, and a long row
    "of 3 columns": RowShape(1, 2, 3, 16, V=3, M=1, N=3),
    "of 19 columns": RowShape(1, 2, 19, 16, V=19, M=20, N=19),
    "of 1000 columns": RowShape(1, 2, 90, 16, V=1000, M=4, N=1000),
}


def lengths(dtype: str, arch: int) -> Iterator[Case]:
    """Short and long rows, in which errors of approximate instructions add up differently."""
    for label, at in LENGTHS.items():
        for spec in (*LAYERS, *TOKEN):
            yield Case(spec, label, dtype, at, 1.0 if spec.name == "sample_tokens" else DROPOUT_P)


# Of the shapes of `aot`, those at which a kernel executes other code; ops that are not named have
# all of theirs. Head dimensions share tiles of 16, 32, 64 and 128, the last two with padding or
# without; the context of 250 masks every tile. Widths of norms: many rows to a program, columns
# that are masked, one warp more, and the widest. Vocabularies: one tile, several, and not a
# multiple of 16, which decides alignment.
TABLE = {
    "causal_attention": "D=16 p=0.2 T=256|D=32 p=0.0 T=256|D=48 p=0.2 T=256|D=64 p=0.2 T=250|"
    "D=64 p=0.2 T=256|D=96 p=0.2 T=256|D=128 p=0.0 T=256",
    "layer_norm": "N=16|N=384|N=384 no bias|N=1024|N=8192",
    "dropout_add_layer_norm": "N=16 p=0.2|N=384 p=0.0|N=384 p=0.2|N=1024 p=0.2|N=8192 p=0.2",
    "cross_entropy": "V=104|V=4096|V=50257",
    "linear_cross_entropy": "V=104|V=4096|V=16384|V=50257",
    "decode_attention": "D=16 N=256|D=48 N=256|D=64 N=256|D=128 N=256",
    "norm_linear": "K=384 N=50257|K=16 N=16|K=16 N=16 gelu|K=384 N=1152|K=384 N=1152 gelu|"
    "K=4096 N=1024|K=4096 N=1024 gelu",
    "sample_tokens": "V=104 .*|V=50257 top-k, top-p",
    "embed_tokens": "C=384",
}
# bfloat16 has the tiles and the alignment of float16. float32 has one tile of scalar arithmetic for
# a head dimension, which is the same code on every architecture and takes LLVM longest.
ATTENTION = {
    "bfloat16": "D=48 p=0.2 T=256|D=64 p=0.2 T=250|D=128 p=0.0 T=256",
    "float32": "D=16 p=0.0 T=256|D=32 p=0.2 T=256",
}


def table(dtype: str, arch: int) -> Iterator[Case]:
    """Shapes of `aot` that exercise all code of the kernels."""
    for case in every(dtype, arch):
        labels = TABLE.get(case.op, ".*")
        if case.op == "causal_attention":
            labels = ATTENTION.get(dtype, labels)
            labels += "|D=64 p=0.2 T=512" if arch == 90 else ""
        if re.fullmatch(labels, case.label):
            yield case


def every(dtype: str, arch: int) -> Iterator[Case]:
    """Every shape at which `aot` compiles, with fewer rows where the kernels stay the same."""
    for c in shapes.every(arch):
        at = c.at
        if c.dtype != dtype:
            continue
        if c.op == "causal_attention":  # still a multiple of 16, or not
            short = at.T // 16 * 6 + at.T % 16
            heads = arch == 90 and dtype != "float32"  # which have one kernel or two by their T
            at = replace(at, H=1, T=min(at.T, 272) if heads else short)
        elif c.op == "embed_layer_norm":
            at = replace(at, T=40)
        elif c.spec.kind == "optimizer":
            at = replace(at, H=1, L=1, T=32)
        elif isinstance(at, RowShape):
            at = replace(at, M=max(2, min(16, 20_000 // at.N)))
        yield Case(**vars(c) | dict(at=at))


EDGES = {  # sizes that no tile divides, and the smallest ones
    "of odd sizes": RowShape(2, 3, 37, 48, V=101, M=21, N=331),
    "of one element": RowShape(1, 1, 1, 16, V=1, M=5, N=1),
    "of few elements": RowShape(1, 2, 17, 16, V=2, M=40, N=17),
}


def edges(dtype: str, arch: int) -> Iterator[Case]:
    """Odd sizes, large scores, and layouts of the inputs. Layouts decide strides and alignment,
    which no other architecture reads in another way: sm_75 has all, the others two in float16."""
    for label, at in EDGES.items():
        for spec in LAYERS:
            yield Case(spec.full_rows or spec, label, dtype, at, DROPOUT_P)
    few = ["transposed", "slice of a wider tensor"] if dtype == "float16" else []
    for layout in LAYOUTS if arch == 75 else few:
        at = RowShape(2, 2, 40, 16 if dtype == "float32" else 32, V=70, M=12, N=48)
        for spec in LAYERS:
            yield Case(spec, spec.size(at), dtype, at, DROPOUT_P, layout=layout)
    at = RowShape(1, 1, 80, 64 if dtype != "float32" else 16)
    yield Case(SPECS["causal_attention"], "scores of hundreds", dtype, at, scale=6.0)


def strides(dtype: str, arch: int) -> Iterator[Case]:
    """Strides of 2^26 to 2^31 elements, so that offsets pass 2^31. Few of the pages exist."""
    at = RowShape(2, 2, 24, 32 if dtype != "float32" else 16, V=100, M=4, N=100)
    for layout in FAR:
        for spec in LAYERS:
            chosen = spec.full_rows or spec
            if dtype != "float32" or not spec.scores:
                yield Case(chosen, spec.size(at), dtype, at, DROPOUT_P, layout=layout)
        for name in ("sample_tokens", "norm_linear", "linear_add"):
            yield Case(SPECS[name], "B=2", dtype, at, 1.0, layout=layout)


def _spread(dim: int, stride: int) -> Callable[[Tensor], Tensor]:
    """A layout: the elements of one dimension lie `stride` apart."""

    def spread(x: Tensor) -> Tensor:
        steps = list(x.contiguous().stride())
        steps[dim] = stride
        span = sum((n - 1) * s for n, s in zip(x.shape, steps, strict=True)) + 1
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        pages = mmap.mmap(-1, span * x.itemsize + 4096, flags=flags)
        flat = torch.frombuffer(pages, dtype=torch.uint8)[: span * x.itemsize].view(x.dtype)
        y = flat.as_strided(x.shape, steps)
        return y.copy_(x)

    return spread


FAR: dict[str, Callable[[Tensor], Tensor]] = {
    "rows 2^30 apart": _spread(-2, 2**30 + 16),  # twice of it passes 2^31
    "rows 2^31 apart": _spread(-2, 2**31 + 32),
    "columns 2^26 apart": _spread(-1, 2**26 + 8),
    "first dimension 2^31 apart": _spread(0, 2**31 + 16),
}
KEYS = [(f"attention {name}", 64, 2) for name in ("forward", "query", "key", "head 256")]
KEYS += [("norm forward", 384, 2), ("norm backward", 384, 2)]
KEYS += [("gelu forward", 512, 2), ("gelu backward", 512, 2)]


def tuned(dtype: str, arch: int) -> Iterator[Case]:
    """Launch options that `irongpt tune` may choose: of each number of warps and stages the first
    and the last tile. The number of programs changes no code."""
    for key in KEYS if dtype == "float16" else []:
        kernel, size, _ = key
        name = {"attention": "causal_attention", "norm": "dropout_add_layer_norm"}
        spec = SPECS[name.get(kernel.split()[0], "gelu")]
        pair = kernel in ("attention query", "attention key")
        T = 272 if pair and arch == 90 else 150  # up to 256 one kernel replaces the two
        at = RowShape(1, 1, T, 64, M=30, N=size // 4 if spec.name == "gelu" else size)
        groups: dict[Any, list[launch_table.Options]] = {}
        for options in tiles.launches(key, arch):
            kind = options.get("num_warps", options.get("warps_per_sm")), options.get("num_stages")
            options = {k: v for k, v in options.items() if k != "maxnreg"}  # it changes no PTX
            groups.setdefault(kind, []).append(options)
        for options in [x for some in groups.values() for x in (some[0], some[-1])]:
            label = f"{kernel} {' '.join(map(str, options.values()))}"
            yield Case(spec, label, dtype, at, DROPOUT_P, table={key: options})


SETS = dict(sample=sample, lengths=lengths, table=table, every=every)
SETS |= dict(edges=edges, strides=strides, tuned=tuned)
