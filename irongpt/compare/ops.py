"""Every op of a candidate against eager: error, repeatability, and what dropout drops.

A case is an op on inputs of one shape class:

    model      the model's own shape; in Triton's interpreter one of its kind that is small
    ragged     sizes that no tile divides
    strided    views: q, k and v of one packed projection, columns of a wider matrix; the gradient
               that comes from above has strides too
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from irongpt_kernels import Ops, dropout, eager, tolerance
from torch import Tensor

from irongpt.device import dtype_name

DROPOUT_P = 0.2
SEED = (5 << 32) + 7  # both halves of the generator's key are in use

Tensors = dict[str, Tensor]
Leaves = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Row:
    """One tensor of one case, against float64."""

    op: str
    shape: str
    sizes: str
    dtype: str
    tensor: str  # an output's name, or d and an input's
    errors: dict[str, tolerance.Errors]  # by norm
    index: list[int]  # of the worst element
    candidate: float  # its three values
    eager: float
    float64: float

    @property
    def ok(self) -> bool:
        return all(e.ok for e in self.errors.values())


@dataclass(frozen=True)
class Check:
    """What is true or not: that two runs give the same bits, that the same elements are dropped."""

    op: str
    shape: str
    dtype: str
    name: str
    ok: bool
    detail: str = ""


class Sizes(NamedTuple):
    B: int
    H: int
    T: int
    D: int
    M: int  # rows of the ops that work on rows
    N: int
    V: int


FULL = {
    "model": Sizes(8, 6, 256, 64, 2048, 384, 96),
    "ragged": Sizes(3, 5, 131, 48, 1021, 401, 1009),
    "strided": Sizes(2, 6, 200, 64, 512, 384, 96),
}
SMALL = {
    "model": Sizes(2, 2, 32, 16, 64, 32, 24),
    "ragged": Sizes(1, 3, 37, 48, 13, 29, 101),
    "strided": Sizes(2, 2, 20, 32, 11, 48, 24),
}


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    leaves: Leaves  # the inputs that have gradients: names and sizes
    call: Callable[[Ops, Tensors], Any]
    outputs: tuple[str, ...] = ("out",)

    @property
    def sizes(self) -> str:
        """Of the first input; the others follow from it."""
        name, size = next(iter(self.leaves.items()))
        return f"{name} {' x '.join(map(str, size))}"


def cases(shape: str, s: Sizes, p: float) -> Iterator[Case]:
    """p: dropout of the ops that drop. The ragged class has none."""
    strided, ragged = shape == "strided", shape == "ragged"
    drop: dict[str, Any] = {} if ragged or p == 0 else dict(dropout_p=p, seed=SEED)
    margin = 8 if strided else 0

    def view(x: Tensor) -> Tensor:
        return x[..., 3 : x.shape[-1] - 5] if strided else x

    def attention(ops: Ops, x: Tensors) -> Tensor:
        q, k, v = x["qkv"].permute(2, 0, 3, 1, 4) if strided else x.values()
        return ops.causal_attention(q, k, v, **drop)

    heads: Leaves = dict.fromkeys("qkv", (s.B, s.H, s.T, s.D))
    packed: Leaves = {"qkv": (s.B, s.T, 3, s.H, s.D)}
    yield Case("causal_attention", shape, packed if strided else heads, attention)
    yield Case(
        "causal_attention_packed",
        shape,
        packed,
        lambda ops, x: ops.causal_attention_packed(x["qkv"], **drop),
    )
    norm: Leaves = dict(weight=(s.N,), bias=(s.N,))
    rows = (s.M, s.N + margin)
    yield Case(
        "layer_norm",
        shape,
        {"x": rows, **norm},
        lambda ops, x: ops.layer_norm(view(x["x"]), x["weight"], x["bias"]),
    )
    yield Case(
        "softmax",
        shape,
        dict(x=(s.M, s.V) if ragged else (s.B, s.H, s.T, s.T + margin)),
        lambda ops, x: ops.softmax(view(x["x"]), scale=s.D**-0.5, causal=not ragged),
    )

    def cross_entropy(ops: Ops, x: Tensors) -> Tensor:
        targets = torch.arange(s.M, device=x["logits"].device) * 7 % s.V
        if ragged:
            targets[::5] = -100
        return ops.cross_entropy(view(x["logits"]), targets)

    yield Case("cross_entropy", shape, dict(logits=(s.M, s.V + margin)), cross_entropy)
    yield Case(
        "gelu",
        shape,
        dict(x=(s.M, 4 * s.N + margin), bias=(4 * s.N,)),
        lambda ops, x: ops.gelu(view(x["x"]), x["bias"]),
    )
    yield Case(
        "dropout_add_layer_norm",
        shape,
        {"branch": rows, "residual": rows, **norm},
        lambda ops, x: ops.dropout_add_layer_norm(
            view(x["branch"]), view(x["residual"]), x["weight"], x["bias"], **drop
        ),
        ("total", "normed"),
    )


def compare_case(
    case: Case, candidate: Ops, dtype: torch.dtype, device: torch.device, drops: bool
) -> tuple[list[Row], list[Check]]:
    """drops: the candidate drops what the seed says, which is checked where the op drops."""
    leaves = {
        name: randn(size, i).to(device, dtype) for i, (name, size) in enumerate(case.leaves.items())
    }
    baseline = _run(case, eager, leaves)
    oracle = _run(case, eager, {name: x.double() for name, x in leaves.items()})
    name = dtype_name(dtype)

    def check(what: str, ok: bool, detail: str = "") -> Check:
        return Check(case.op, case.shape, name, what, ok, detail)

    try:
        results, again = (_run(case, candidate, leaves) for _ in range(2))
        wrong = _wrongly_dropped(case, candidate, leaves) if drops else None
    except Exception as e:  # a kernel that cannot run here is a finding among the others
        return [], [check("runs", False, " ".join(f"{type(e).__name__}: {e}".split())[:300])]
    rows = [
        make_row(case.op, case.shape, case.sizes, name, t, results[t], baseline[t], oracle[t])
        for t in results
    ]
    differing = [t for t in results if not torch.equal(results[t], again[t])]
    checks = [check("repeatable", not differing, "two runs differ in " + ", ".join(differing))]
    if wrong is not None:
        detail = "other elements than eager's are dropped in " + ", ".join(wrong)
        checks.append(check("dropout mask", not wrong, detail))
    return rows, checks


def make_row(
    op: str, shape: str, sizes: str, dtype: str, tensor: str, x: Tensor, base: Tensor, want: Tensor
) -> Row:
    """x: the candidate's, base: eager's, want: float64's."""
    factor = tolerance.GRADIENTS if tensor.startswith("d ") else tolerance.OUTPUTS
    distance = (x.double() - want).abs().nan_to_num(nan=float("inf"))
    index = [int(i) for i in torch.unravel_index(distance.argmax(), x.shape)]
    values = (float(t[tuple(index)]) for t in (x, base, want))
    return Row(
        op, shape, sizes, dtype, tensor, tolerance.errors(factor, x, base, want), index, *values
    )


def randn(size: tuple[int, ...], seed: int) -> Tensor:
    """The same values on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dtype=torch.float64, generator=generator)


def _run(case: Case, ops: Ops, leaves: Tensors) -> Tensors:
    """Outputs by their names, gradients as `d x`."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    out = case.call(ops, leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    upstream = []
    for i, x in enumerate(outputs, 90):
        g = randn(tuple(x.shape), i).to(x.device, x.dtype)
        upstream.append(torch.stack([g, g], -1)[..., 0] if case.shape == "strided" else g)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return {
        **{name: x.detach() for name, x in zip(case.outputs, outputs, strict=True)},
        **{f"d {name}": g for name, g in zip(leaves, gradients, strict=True)},
    }


def _wrongly_dropped(case: Case, ops: Ops, leaves: Tensors) -> list[str] | None:
    """Where the op drops other elements than the seed says; None for an op that drops nothing."""
    x = next(iter(leaves.values()))
    if case.op == "dropout_add_layer_norm":
        return _wrong_rows(ops, x)
    if case.op == "causal_attention":  # the packed op runs the same kernels
        shape = x.permute(2, 0, 3, 1, 4)[0].shape if "qkv" in leaves else x.shape
        return _wrong_weights(ops, x.new_zeros(shape))
    return None


def _wrong_rows(ops: Ops, x: Tensor) -> list[str]:
    """A branch of ones on a residual of zeros: what is zero was dropped, and so its gradient."""
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
    """The mask as the output and each gradient of attention show it, D rows or columns at a time.

    Scores of zero make all weights of row i equal, 1 / (i + 1). A v, k, q or upstream gradient
    that is D columns of the identity then copies D columns or rows of the matrix into the result:
    of the weights, in out and d v, where zero is dropped; of d scores, in d q and d k. There, with
    v and the upstream gradient of ones, an element is weight * (D scale * kept - delta), above 0
    if it is kept and below if not, but in rows that keep all or nothing.
    """
    B, H, T, D = zeros.shape
    keep = dropout.attention_keep(SEED, B, H, T, DROPOUT_P, zeros.device).tril()
    kept = keep.sum(-1, keepdim=True)
    seen = torch.arange(1, T + 1, device=zeros.device)[:, None]
    mixed = ((kept > 0) & (kept < seen)).expand_as(keep).tril()
    ones = torch.ones_like(zeros)
    wrong = set()

    def grads(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = ops.causal_attention(*leaves, dropout_p=DROPOUT_P, seed=SEED)
        return out, *torch.autograd.grad(out, leaves, dout)

    for first in range(0, T, D):
        part = slice(first, first + D)
        n = min(D, T - first)
        unit = torch.eye(T, device=zeros.device, dtype=zeros.dtype)[:, part]
        block = torch.zeros_like(zeros)
        block[..., :n] = unit
        out, _, _, dv = grads(zeros, zeros, block, block)
        _, dq, _, _ = grads(zeros, block, ones, ones)
        _, _, dk, _ = grads(block, zeros, ones, ones)
        columns, rows = keep[..., part], keep[..., part, :].transpose(-2, -1)
        if not torch.equal(out[..., :n] != 0, columns):
            wrong.add("out")
        if not torch.equal(dv[..., :n] != 0, rows):
            wrong.add("d v")
        if ((dq[..., :n] > 0) != columns)[mixed[..., part]].any():
            wrong.add("d q")
        if ((dk[..., :n] > 0) != rows)[mixed[..., part, :].transpose(-2, -1)].any():
            wrong.add("d k")
    return sorted(wrong)
