"""Random calls of every op against eager in float64, by the one tolerance, in Triton's interpreter.

A case samples the op, its sizes, dtypes and options, which inputs are given and which are frozen,
the scale and the memory layout of each input and of each upstream gradient.

In a tensor of few values eager may be exact by chance. So a call that exceeds the tolerance is
repeated with other values. The case fails if most of DRAWS calls exceed the tolerance, and if all
of their values together, as one larger tensor, exceed it too.
"""

import math
import random
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from irongpt_kernels import eager, fused, op_inputs
from irongpt_kernels.op_inputs import IGNORED, RowShape, Tensors
from irongpt_kernels.op_specs import LAYERS, OPTIMIZERS, TOKEN, OpSpec
from numerics import LAYOUTS
from poison import poison
from torch import Tensor

from tests.ptx import cases

ROWS = [*LAYERS, *LAYERS, *OPTIMIZERS, *TOKEN]
ROWS += [spec.full_rows for spec in ROWS if spec.full_rows]
CPU = torch.device("cpu")
HALF = torch.float16
DRAWS = 9
# Inputs whose rows are equal have outputs or gradients that vanish, which nothing is exact for.
INPUT_LAYOUTS = [name for name in LAYOUTS if "expanded" not in name]


def size(rng: random.Random, most: int) -> int:
    """From 1 to `most`: often small, often next to a power of two."""
    power = 2 ** rng.randrange(most.bit_length())
    return min(most, max(1, rng.choice((power + rng.choice((-1, 0, 1)), rng.randint(1, most)))))


def scale(rng: random.Random, low: float, high: float) -> float:
    return 10 ** rng.uniform(low, high) if rng.random() < 0.7 else 1.0


class Call:
    """A random call of an op. `text` describes it. draw: selects other values of the tensors."""

    def __init__(self, rng: random.Random, draw: int = 0) -> None:
        self.draw = draw << 31
        self.spec: OpSpec = rng.choice(ROWS)
        wide = self.spec.kind == "layer"
        self.at = RowShape(
            B=size(rng, 3), H=size(rng, 3), T=size(rng, 40),
            D=16 * (rng.randint(1, 8) if rng.random() < 0.3 else 1), V=size(rng, 300), L=1,
            M=size(rng, 24), N=size(rng, 300 if wide else 24),
        )  # fmt: skip
        if self.at.N == 2:  # the norm of two values is 1 and -1: its gradient vanishes
            self.at = replace(self.at, N=3)
        if self.spec.kind == "optimizer":  # its weights begin at multiples of 16 bytes
            self.at = replace(self.at, V=rng.randint(8, 40), N=8 * rng.randint(1, 3))
        compute = rng.choice((torch.float32, HALF))
        other = (compute, torch.float32) if not wide else (compute, compute, torch.float32, HALF)
        roles = {name: rng.choice(other) for name in ("stream", "weight")} if wide else {}
        self.kinds = op_inputs.dtypes(compute, **roles)
        self.seed = rng.getrandbits(63)
        p = rng.choice((0.0, 0.0, 0.1, 0.3, 0.5, 0.9)) if wide else rng.choice((0.0, 0.7, 1.0, 2.0))
        self.options = self.spec.options(self.at, p, self.seed) | self.more_options(rng)
        self.inputs = self.made(rng)
        floats = [n for n, x in self.inputs.items() if x.is_floating_point()]
        self.learned = rng.sample(floats, rng.randint(1, len(floats)))
        if rng.random() < 0.5:
            self.learned = floats
        self.upstream = [(scale(rng, -3, 2), self.layout(rng), self.value_seed(rng)) for _ in "12"]
        self.text = f"{self.spec.name} {self.at} {self.options} {self.laid_out} " + ", ".join(
            f"{n} {tuple(x.shape)} {x.dtype} {x.stride()}" for n, x in self.inputs.items()
        )

    def more_options(self, rng: random.Random) -> dict[str, Any]:
        name, more = self.spec.name, dict[str, Any]()
        if name in ("softmax", "causal_attention", "causal_attention_packed"):
            more = dict(scale=self.at.D**-0.5 * scale(rng, -2, 0.3))
        elif name in ("layer_norm", "dropout_add_layer_norm") and rng.random() < 0.5:
            more = dict(eps=rng.choice((1e-8, 1e-5, 1e-3, 0.1)))
        elif name == "sample_tokens":
            more = dict(top_k=rng.choice((None, 1, size(rng, self.at.V))))
            more |= dict(top_p=rng.choice((None, 0.5, 0.95)))
        return more

    def value_seed(self, rng: random.Random) -> int:
        return rng.getrandbits(31) + self.draw

    @staticmethod
    def layout(rng: random.Random, layouts: Iterable[str] = LAYOUTS) -> str:
        return rng.choice(list(layouts)) if rng.random() < 0.5 else "contiguous"

    def made(self, rng: random.Random) -> Tensors:
        """The inputs. Those that an op changes, and vectors, are contiguous."""
        wanted = self.spec.inputs(self.at)
        given = {n for n, x in wanted.items() if not x.optional or rng.random() < 0.5}
        wanted = {n: replace(wanted[n], optional=False) for n in wanted if n in given}
        made = op_inputs.random_inputs(wanted, self.kinds, CPU, self.value_seed(rng))
        self.laid_out: dict[str, str] = {}
        for name, x in made.items():
            plain = wanted[name].values is None and wanted[name].fill is None
            if x.is_floating_point() and plain and self.spec.kind != "optimizer":
                x *= scale(
                    rng, -2.5, 0.5 if self.spec.scores or "attention" in self.spec.name else 1.3
                )
            if x.dim() > 1 and x.is_floating_point() and name not in self.spec.changes:
                self.laid_out[name] = self.layout(rng, INPUT_LAYOUTS)
                made[name] = LAYOUTS.get(self.laid_out[name], lambda x: x)(x)
            elif wanted[name].ignorable and rng.random() < 0.5:
                x[torch.rand(x.shape) < rng.choice((0.1, 0.9))] = IGNORED
        return made

    def results(self, ops: Any, dtype: torch.dtype | None = None) -> Tensors:
        """Outputs and what was changed in place, by name or number; gradients as `d x`."""
        x = {n: t.to(dtype) if dtype and t.is_floating_point() else t
             for n, t in self.inputs.items()}  # fmt: skip

        def call(x: Tensors) -> tuple[Tensor, ...]:
            return self.spec.run(ops, self.at, x, **self.options)

        if self.spec.differentiable:
            return op_inputs.results(call, x, self.spec.outputs, self.gradient, self.learned)
        x = {n: t.clone() if n in self.spec.changes or t.dim() < 2 else t for n, t in x.items()}
        return {str(i): y for i, y in enumerate(call(x))}

    def gradient(self, i: int, y: Tensor) -> Tensor:
        factor, layout, seed = self.upstream[i]
        kind = self.kinds["compute"] if y.dtype == torch.float64 else y.dtype
        g = (op_inputs.normal(tuple(y.shape), seed) * factor).to(kind).to(y.dtype)
        return LAYOUTS[layout](g) if layout in LAYOUTS and g.dim() > 1 else g


class ExceededError(AssertionError):
    """An error is larger than the tolerance."""


def compare(found: Tensors, base: Tensors, oracle: Tensors) -> None:
    """By the tolerance, where eager is finite if the oracle is."""
    assert found.keys() == base.keys() == oracle.keys(), (list(found), list(base))
    overflow = {n: z.isfinite() & ~base[n].isfinite() for n, z in oracle.items()}
    kept = [{n: x.where(~overflow[n], 0) for n, x in y.items()} for y in (found, base, oracle)]
    for message, share in cases.differences(*kept):
        if share > 1:
            raise AssertionError(message) if share == math.inf else ExceededError(message)


class Case:
    """Runs a call by eager, by eager in float64, and by the fused ops in the context `place`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        torch.set_num_threads(1)

    def place(self) -> AbstractContextManager[Any]:
        from interpreter_matmul import repeatable

        return repeatable()

    def __call__(self, rng: random.Random, number: int) -> str:
        state, exceeded, results = rng.getstate(), 0, []
        for draw in range(DRAWS):
            rng.setstate(state)
            torch.manual_seed(number)
            call = Call(rng, draw)
            try:
                results.append(self.run(call))
                compare(*results[-1])
                if draw == 0:
                    break
            except ExceededError:
                exceeded += 1
            except Exception as e:
                text = f"{type(e).__name__}: {str(e)[:2000]}\nof {call.text}"
                raise AssertionError(text) from e
        if exceeded > DRAWS // 2:
            together = [
                {n: torch.cat([r[i][n].flatten() for r in results]) for n in results[0][i]}
                for i in range(3)
            ]
            try:
                compare(*together)
            except ExceededError as e:
                raise AssertionError(f"in {exceeded} of {DRAWS} draws: {e}\n{call.text}") from e
        again = ", repeated" if exceeded else ""
        return f"{call.spec.name} {call.kinds['compute']}{again}".replace("torch.", "")

    def run(self, call: Call) -> tuple[Tensors, Tensors, Tensors]:
        """By the fused ops, by eager, and by eager in float64."""
        with poison(), self.place() as report:
            found = call.results(fused)
        assert report is None or not report.lines(), report.lines()
        return found, call.results(eager), call.results(eager, torch.float64)
