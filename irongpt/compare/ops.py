"""Every op of a candidate against eager: error, repeatability, and the dropout mask.

A case is an op on inputs of one shape class:

    model      the model's shape; in Triton's interpreter a small one of its kind
    ragged     sizes that no tile divides
    strided    views: q, k and v of one packed projection, columns of a wider matrix; the upstream
               gradient has strides too
    V=4,096    few rows and a large vocabulary, for the ops whose cost depends on the vocabulary,
    V=50,304   including those of a decoding step

The optimizers and the other ops of a decoding step have cases of the first class only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from irongpt_kernels import Ops, dropout, eager, op_inputs, tolerance
from irongpt_kernels.op_inputs import SEED, Input, RowShape, Tensors
from irongpt_kernels.op_specs import LAYERS, OPTIMIZERS, SPECS, TOKEN, OpSpec
from torch import Tensor

from irongpt.device import dtype_name
from irongpt.errors import one_line

DROPOUT_P = 0.2
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Row:
    """One tensor of one case, against float64."""

    op: str
    shape: str
    sizes: str
    dtype: str
    tensor: str  # an output's name, or d and an input's
    errors: dict[str, tolerance.Errors]  # by norm
    worst: dict[str, Any]  # the index of the worst element, and its three values

    @property
    def ok(self) -> bool:
        return all(e.ok for e in self.errors.values())


@dataclass(frozen=True)
class Check:
    """A property that is checked, such as: two runs give the same bits."""

    op: str
    shape: str
    dtype: str
    name: str
    ok: bool
    detail: str = ""


FULL = {
    "model": RowShape(8, 6, 256, 64, 96, M=2048, N=384),
    "ragged": RowShape(3, 5, 131, 48, 1009, M=1021, N=401),
    "strided": RowShape(2, 6, 200, 64, 96, M=512, N=384),
}
SMALL = {
    "model": RowShape(2, 2, 32, 16, 24, L=1, M=64, N=32),
    "ragged": RowShape(1, 3, 37, 48, 101, M=13, N=29),
    "strided": RowShape(2, 2, 20, 32, 24, M=11, N=48),
}
FULL_ROWS, SMALL_ROWS = RowShape(2, 6, 256, 64, M=64, N=384), RowShape(2, 2, 32, 16, M=3, N=32)
VOCABULARIES = (4096, 50304)


@dataclass(frozen=True)
class Case:
    """An op at a shape of one class. p: dropout, or the temperature of sample_tokens."""

    spec: OpSpec
    shape: str
    at: RowShape
    p: float

    @property
    def op(self) -> str:
        return self.spec.name

    @property
    def sizes(self) -> str:
        """The sizes of the first floating input, from which the others follow."""
        name, one = next((n, x) for n, x in self.inputs().items() if x.role != "integer")
        return f"{name} {' x '.join(map(str, one.size))}"

    def inputs(self) -> dict[str, Input]:
        """The tensors to allocate. `views` makes the op's inputs from them."""
        found = self.spec.inputs(self.at)
        if self.shape != "strided":
            return found
        if "q" in found:
            return {"qkv": Input((self.at.B, self.at.T, 3, self.at.H, self.at.D))}
        return {  # a packed projection, of five dimensions, stays as it is
            n: replace(x, size=(*x.size[:-1], x.size[-1] + 8)) if 2 <= len(x.size) <= 4 else x
            for n, x in found.items()
        }

    def values(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        """Their values. All floats have `dtype`, also those that are float32 in training, except in
        an optimizer."""
        if self.spec.kind == "optimizer":
            return op_inputs.random_inputs(self.inputs(), op_inputs.dtypes(dtype), device)
        found = {}
        for i, (name, x) in enumerate(self.inputs().items()):
            if x.role != "integer":
                found[name] = op_inputs.normal(x.size, i).to(device, dtype)
            elif x.values:
                found[name] = x.values(torch.empty(x.size, dtype=torch.int64, device=device))
            else:
                found[name] = op_inputs.indices(x, ignored=self.shape == "ragged").to(device)
        return found

    def views(self, x: Tensors) -> Tensors:
        """The op's inputs."""
        if self.shape != "strided":
            return x
        own = self.spec.inputs(self.at)
        if "q" in own:
            return dict(zip("qkv", x["qkv"].permute(2, 0, 3, 1, 4), strict=True))
        return {n: t if t.shape == own[n].size else t[..., 3:-5] for n, t in x.items()}

    def run(self, ops: Ops, inputs: Tensors) -> Tensors:
        """Outputs and inputs changed in place by their names, gradients as `d x`."""
        options = self.spec.options(self.at, self.p, SEED if self.p else None)

        def upstream(i: int, x: Tensor) -> Tensor:
            g = op_inputs.normal(tuple(x.shape), 90 + i).to(x.device, x.dtype)
            return torch.stack([g, g], -1)[..., 0] if self.shape == "strided" else g

        def call(x: Tensors) -> Any:
            return self.spec.run(ops, self.at, self.views(x), **options)

        if self.spec.differentiable:
            return op_inputs.results(call, inputs, self.spec.outputs, upstream)
        own = {n: x.clone() for n, x in inputs.items()}
        names = (*self.spec.outputs, *self.spec.changed(own))
        return dict(zip(names, call(own), strict=True))


def cases(shape: str, at: RowShape, with_dropout: bool) -> Iterator[Case]:
    """Every op with a gradient, and at the model's shape every other one. The ragged class never
    has dropout."""
    for spec in LAYERS:
        ragged = shape == "ragged"
        chosen = spec.full_rows if ragged and spec.full_rows else spec
        drops = with_dropout and spec.dropout and not ragged
        yield Case(chosen, shape, at, DROPOUT_P if drops else 0.0)
    for spec in (*TOKEN, *OPTIMIZERS) if shape == "model" else ():
        yield Case(spec, shape, at, TEMPERATURE if spec.kind == "token" else 0.0)


def vocabulary_cases(at: RowShape) -> Iterator[Case]:
    """Every op that the benchmarks sweep over the vocabulary."""
    for spec in SPECS.values():
        if chosen := spec.for_sweep("V"):
            p = TEMPERATURE if chosen.kind == "token" else 0.0
            yield from (Case(chosen, f"V={V:,}", replace(at, V=V), p) for V in VOCABULARIES)


def all_cases(full: bool, with_dropout: bool) -> list[Case]:
    """The cases of a GPU (full) or of the interpreter, those of the model's shape first."""
    by_class = [cases(k, at, with_dropout) for k, at in (FULL if full else SMALL).items()]
    return [*chain(*by_class), *vocabulary_cases(FULL_ROWS if full else SMALL_ROWS)]


def compare_case(
    case: Case, candidate: Ops, dtype: torch.dtype, device: torch.device, with_dropout: bool
) -> tuple[list[Row], list[Check]]:
    """with_dropout: whether the candidate's dropout masks must be those of the seed."""
    inputs = case.values(dtype, device)
    baseline = case.run(eager, inputs)
    oracle = case.run(eager, op_inputs.widened(inputs))
    name = dtype_name(dtype)

    def check(what: str, ok: bool, detail: str = "") -> Check:
        return Check(case.op, case.shape, name, what, ok, detail)

    try:
        results, again = (case.run(candidate, inputs) for _ in range(2))
        wrong = _wrongly_dropped(case, candidate, inputs) if with_dropout else None
    except Exception as e:  # a kernel that fails to run is reported like a wrong result
        return [], [check("runs", False, one_line(e))]
    rows = make_rows(case.op, case.shape, case.sizes, name, results, baseline, oracle)
    differing = [t for t in results if not torch.equal(results[t], again[t])]
    checks = [check("repeatable", not differing, "two runs differ in " + ", ".join(differing))]
    whole = [t for t in results if not results[t].is_floating_point()]
    if whole:
        other = [t for t in whole if not torch.equal(results[t], baseline[t])]
        detail = "other values than eager's in " + ", ".join(other)
        checks.append(check("integers", not other, detail))
    if wrong is not None:
        detail = "other elements than eager's are dropped in " + ", ".join(wrong)
        checks.append(check("dropout mask", not wrong, detail))
    return rows, checks


def make_rows(op: str, shape: str, sizes: str, dtype: str, *results: Tensors) -> list[Row]:
    """A row for each floating tensor.

    results: those of the candidate, of eager in the same dtype, and of eager in float64.
    """
    rows = []
    for name in (name for name, x in results[0].items() if x.is_floating_point()):
        candidate, baseline, oracle = (x[name] for x in results)
        distance = (candidate.double() - oracle).abs().nan_to_num(nan=float("inf"))
        index = [int(i) for i in torch.unravel_index(distance.argmax(), candidate.shape)]
        values = dict(candidate=candidate, eager=baseline, float64=oracle)
        worst = dict(index=index) | {kind: float(x[tuple(index)]) for kind, x in values.items()}
        errors = tolerance.errors(factor(name), candidate, baseline, oracle)
        rows.append(Row(op, shape, sizes, dtype, name, errors, worst))
    return rows


def factor(tensor: str) -> int:
    """How many times eager's error is allowed for an output, or for a gradient `d x`."""
    return tolerance.GRADIENTS if tensor.startswith("d ") else tolerance.OUTPUTS


def _wrongly_dropped(case: Case, ops: Ops, inputs: Tensors) -> list[str] | None:
    """Where the op zeroes other elements than the seed determines; None for an op without dropout
    and for the packed attention, which runs the kernels of causal_attention."""
    x = next(iter(inputs.values()))
    if case.op == "dropout_add_layer_norm":
        return _wrong_rows(ops, x)
    if case.op == "causal_attention":
        return _wrong_weights(ops, x.new_zeros(case.spec.inputs(case.at)["q"].size))
    return None


def _wrong_rows(ops: Ops, x: Tensor) -> list[str]:
    """With a branch of ones and a residual of zeros, a dropped element and its gradient are 0."""
    M, N = x.shape
    keep = dropout.row_keep(SEED, M, N, DROPOUT_P, x.device)
    branch = torch.ones_like(x).requires_grad_()
    total, _ = ops.dropout_add_layer_norm(
        branch, torch.zeros_like(x), x.new_ones(N), dropout_p=DROPOUT_P, seed=SEED
    )
    (dbranch,) = torch.autograd.grad(total, branch, torch.ones_like(total))
    found = {"total": total, "d branch": dbranch}
    return [name for name, t in found.items() if not torch.equal(t != 0, keep)]


def _wrong_weights(ops: Ops, zeros: Tensor) -> list[str]:
    """Reads the mask from the output and each gradient of attention, D rows or columns at a time.

    Scores of zero make all weights of row i equal, 1 / (i + 1). A v, k, q or upstream gradient that
    is D columns of the identity then copies D columns or rows of a (T, T) matrix into the result.
    For out and d v this matrix is the weights, in which dropped elements are 0. For d q and d k it
    is d scores: with v and the upstream gradient of ones, an element is
    weight * (D * scale * kept - delta), above 0 if it is kept and below 0 if it is dropped, except
    in rows that keep all or none.
    """
    B, H, T, D = zeros.shape
    keep = dropout.attention_keep(SEED, B, H, T, DROPOUT_P, zeros.device).tril()
    kept = keep.sum(-1, keepdim=True)
    positions = torch.arange(1, T + 1, device=zeros.device)[:, None]
    mixed = ((kept > 0) & (kept < positions)).expand_as(keep).tril()
    ones = torch.ones_like(zeros)
    found = {name: torch.zeros_like(keep) for name in ("d k", "d q", "d v", "out")}

    def grads(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = ops.causal_attention(*leaves, dropout_p=DROPOUT_P, seed=SEED)
        return out, *torch.autograd.grad(out, leaves, dout)

    for first in range(0, T, D):
        part = slice(first, first + D)
        n = min(D, T - first)
        block = torch.zeros_like(zeros)
        block[..., :n] = torch.eye(T, device=zeros.device, dtype=zeros.dtype)[:, part]
        out, _, _, dv = grads(zeros, zeros, block, block)
        _, dq, _, _ = grads(zeros, block, ones, ones)
        _, _, dk, _ = grads(block, zeros, ones, ones)
        found["out"][..., part] = out[..., :n] != 0
        found["d v"][..., part, :] = (dv[..., :n] != 0).mT
        found["d q"][..., part] = dq[..., :n] > 0
        found["d k"][..., part, :] = (dk[..., :n] > 0).mT
    wrong = {name: x != keep for name, x in found.items()}
    for name in ("d k", "d q"):
        wrong[name] &= mixed
    return [name for name, x in wrong.items() if x.any()]
