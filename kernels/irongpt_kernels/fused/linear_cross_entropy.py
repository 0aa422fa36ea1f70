"""Mean cross-entropy of the logits of a linear layer, with the gradients of both its inputs.

    loss = linear_cross_entropy(x, w, t)     x: (M, C)    w: (V, C)    t: (M,) int64    loss: 0-d

Logits:             z = x w^T, by cuBLAS
Kernel, per row:    m = max(z)      rest = sum over v != t of exp(z_v - m)
                    total = rest + exp(z_t - m)
                    loss_row = log(total) - (z_t - m)         loss = sum(loss_row) / M, float32
                    dz_v = exp(z_v - m) s / (M total)         dz_t = -rest s / (M total)
Gradients:          dx = dz w      dw = dz^T x, by cuBLAS

s is `loss_scale`, the gradient that the loss is expected to get. The forward computes all of this
(without gradients, if none is wanted). The backward only multiplies dx and dw by dloss / s, and
launches nothing if dloss is the tensor s.

Traffic     The kernel reads z and overwrites it with dz: 2MV elements. Separate kernels for forward
            and backward would move 3MV. Rows longer than MAX_BLOCK are read twice, the
            second time from L2. The three matmuls move z or dz once each. Between forward and
            backward dx and dw are kept, (M + V) C elements. If the logits of all rows take more
            than LOGITS_BYTES, the rows are processed in chunks. The dw of each chunk is
            rounded to the dtype of x, and the chunks are summed in float32.
Parallelism A program handles BLOCK_M rows. Rows of up to MAX_BLOCK stay in registers between the
            sums and the gradient. The program stores the sum of its rows' losses, and one program
            of a second kernel adds these partial sums in a fixed order.
Precision   float32 between load and store. As in `cross_entropy`, rest leaves out the true class,
            so that the loss and the gradient of a confident row (p_t near 1) stay accurate. dz is
            multiplied by s before it is rounded to the dtype of z; otherwise a float16 dz below
            3e-8 would become 0.
Limits      Columns from `classes` on are padding: their logits are not used, their dz is 0. x and w
            have one dtype; autocast casts both, as for a linear layer. On the CPU a target outside
            [0, classes) raises ValueError; on a GPU that check would make the host wait, and the
            loss and the gradients that the target affects become NaN instead. The stored dx and dw
            contain the factor s, by default 1 and in float16 FLOAT16_SCALE. So in float16 an
            element beyond +-65,504 / s becomes infinite, where `eager` may be finite.
Spec        irongpt_kernels/eager.py::linear_cross_entropy
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.fused.cross_entropy import log1p
from irongpt_kernels.runtime import checks, launch
from irongpt_kernels.runtime.custom_op import autocast, custom_op

LOGITS_BYTES = 1 << 30  # bytes of logits at a time; a larger batch is processed in chunks
MAX_BLOCK = 16384  # the longest row held in registers: 16 warps, 32 values a thread
LONG_BLOCK = 4096  # columns at a time of longer rows
CHUNK_MULTIPLE = 128  # the number of rows in a chunk is a multiple of it
TILE = 1024  # elements per program if rows are short: 2 warps
PARTS = 4096  # partial sums that the second kernel reads at a time
FLOAT16_SCALE = 1024.0  # loss_scale of float16 by default: for gradients from 6e-11 to 64


@triton.jit
def _add_block(z, cols, t, m, rest, z_t):
    """Adds a block of columns to m, rest and z_t, (BLOCK_M,) each. Returns them and exp(z - m),
    (BLOCK_M, BLOCK_N), 0 for the target."""
    m_new = tl.maximum(m, tl.max(z, axis=1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf would be NaN
    true = cols == t[:, None]
    e = tl.where(true, 0.0, tl.exp(z - shift[:, None]))
    rest = rest * tl.exp(m - shift) + tl.sum(e, axis=1)
    # `cross_entropy` loads z_t after the loop. Here a faster warp of this program may have
    # overwritten it with its gradient by then.
    z_t += tl.sum(tl.where(true, z, 0.0), axis=1)
    return m_new, rest, z_t, e


@triton.jit
def _row_kernel(
    z_ptr, t_ptr, scale_ptr, sums_ptr, M, classes, units, n,
    UNIT: tl.constexpr, GRADIENT: tl.constexpr, LONG: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z: contiguous rows of V columns. V is passed as units * UNIT, so that the compiler sees the
    alignment of the rows.

    n: float, the number of rows that the loss is the mean of.
    """
    row_tile = tl.program_id(0).to(tl.int64)  # int64: M V can exceed 2^31
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    V = units * UNIT
    t = tl.load(t_ptr + rows, mask=rows < M, other=0)
    bad = (t < 0) | (t >= classes)
    t = t.to(tl.int32)
    z_rows = z_ptr + rows[:, None] * V

    m = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    rest = tl.zeros((BLOCK_M,), dtype=tl.float32)
    z_t = tl.zeros((BLOCK_M,), dtype=tl.float32)
    cols = tl.arange(0, BLOCK_N)[None, :]
    if LONG:
        for start in range(0, V, BLOCK_N):
            at = start + cols
            z = tl.load(z_rows + at, mask=(rows < M)[:, None] & (at < V), other=0.0)
            z = tl.where(at < classes, z.to(tl.float32), float("-inf"))
            m, rest, z_t, _ = _add_block(z, at, t, m, rest, z_t)
    else:
        z = tl.load(z_rows + cols, mask=(rows < M)[:, None] & (cols < V), other=0.0)
        z = tl.where(cols < classes, z.to(tl.float32), float("-inf"))  # (BLOCK_M, BLOCK_N)
        m, rest, z_t, e = _add_block(z, cols, t, m, rest, z_t)

    m = tl.where(bad, float("nan"), m)
    below = z_t - m  # 0 where the target has the largest logit
    total = rest + tl.exp(below)
    loss = tl.where(below == 0.0, log1p(rest), tl.log(total) - below)
    tl.store(sums_ptr + row_tile, tl.sum(tl.where(rows < M, loss, 0.0), 0))

    if GRADIENT:
        scale = 1.0
        if scale_ptr is not None:
            scale = tl.load(scale_ptr)
        scale = tl.div_rn(tl.div_rn(scale, n), total)
        if LONG:
            for start in range(0, V, BLOCK_N):
                at = start + cols
                mask = (rows < M)[:, None] & (at < V)
                z = tl.load(z_rows + at, mask=mask, other=0.0)
                z = tl.where(at < classes, z.to(tl.float32), float("-inf"))
                _store_gradient(z_rows, at, mask, tl.exp(z - m[:, None]), t, rest, scale, classes)
        else:
            mask = (rows < M)[:, None] & (cols < V)
            _store_gradient(z_rows, cols, mask, e, t, rest, scale, classes)


@triton.jit
def _store_gradient(z_rows, cols, mask, e, t, rest, scale, classes):
    """Overwrites a block of columns of z with dz. e: exp(z - m)."""
    e = tl.where(cols == t[:, None], -rest[:, None], e)
    tl.store(z_rows + cols, tl.where(cols < classes, e * scale[:, None], 0.0), mask=mask)


@triton.jit
def _mean_kernel(sums_ptr, loss_ptr, parts, n, PARTS: tl.constexpr):
    """A single program adds the partial sums and stores the loss."""
    total = tl.zeros((PARTS,), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(sums_ptr + part, mask=part < parts, other=0.0)
    tl.store(loss_ptr, tl.div_rn(tl.sum(total, 0), n))


def gradient_in_place(
    z: Tensor, t: Tensor, sums: Tensor, n: int, loss_scale: Tensor | None, classes: int,
    gradient: bool = True,
) -> None:  # fmt: skip
    """Stores the sum of the losses of each tile of rows, and overwrites z with its gradient.

    z: (M, V), contiguous. t: (M,). sums: (tiles,) or more, float32. n: the number of rows that the
    loss is the mean of. Without `gradient` z stays as it is.
    """
    M, V = z.shape
    if M:
        unit = 8 if V % 8 == 0 else 1
        options = launch_options(V)
        _row_kernel[(triton.cdiv(M, options["BLOCK_M"]),)](
            z, t, loss_scale, sums, M, classes, V // unit, float(n),
            UNIT=unit, GRADIENT=gradient, LONG=options["BLOCK_N"] < V, **options,
        )  # fmt: skip


def launch_options(V: int) -> dict[str, int]:
    """Launch options of the row kernel for rows of V logits."""
    return launch.row_options(V, MAX_BLOCK if V <= MAX_BLOCK else LONG_BLOCK, TILE)


def linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, t: Tensor, loss_scale: Tensor | None, classes: int, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (M, C). weight: (V, C). Returns the loss, 0-d; and dx and dweight times `loss_scale`, or
    without `gradient` two empty tensors."""
    checks.ids(classes, targets=t)  # not in the public function, which is traced
    x, weight, t = x.contiguous(), weight.contiguous(), t.contiguous()
    M, V = len(x), len(weight)
    fit = LOGITS_BYTES // (V * x.itemsize)
    rows = max(1, M) if fit >= M else max(CHUNK_MULTIPLE, fit // CHUNK_MULTIPLE * CHUNK_MULTIPLE)
    BLOCK_M = launch_options(V)["BLOCK_M"]
    sums = torch.empty(triton.cdiv(M, BLOCK_M), dtype=torch.float32, device=x.device)
    loss = sums.new_empty(())
    dx, dw = x.new_empty(x.shape if gradient else 0), x.new_empty(0)
    for first in range(0, max(1, M), rows):
        part = slice(first, first + rows)
        z = x[part] @ weight.T
        gradient_in_place(z, t[part], sums[first // BLOCK_M :], M, loss_scale, classes, gradient)
        if gradient:
            torch.mm(z, weight, out=dx[part])
            term = z.T @ x[part]
            dw = term if rows >= M else dw.add_(term) if first else term.float()
        del z  # before the next chunk allocates its own
    _mean_kernel[(1,)](sums, loss, len(sums), float(M), PARTS=PARTS, num_warps=8)
    return loss, dx, dw.to(x.dtype)


def linear_cross_entropy_bwd(
    dloss: Tensor, loss_scale: Tensor | None, dx: Tensor, dweight: Tensor
) -> tuple[Tensor, Tensor]:
    """Rescales the gradients of the forward from the upstream gradient loss_scale to dloss."""
    factor = dloss if loss_scale is None else dloss / loss_scale
    # PyTorch would round a 0-d factor on a GPU to the dtype of 16-bit gradients.
    return (dx.float() * factor).to(dx.dtype), (dweight.float() * factor).to(dweight.dtype)


def _fake_fwd(
    x: Tensor, weight: Tensor, _t: Tensor, _scale: Tensor | None, _classes: int, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.float32)
    dx, dweight = (a.new_empty(a.shape if gradient else 0) for a in (x, weight))
    return loss, dx, dweight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss_scale, (_, dx, dweight) = inputs[3], output
    ctx.mark_non_differentiable(dx, dweight)
    ctx.save_for_backward(loss_scale, dx, dweight)
    ctx.set_materialize_grads(False)  # else zeros are allocated for dx and dweight


def _backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 6
    if torch.is_grad_enabled():  # create_graph=True: autograd would take dx and dweight as constant
        raise NotImplementedError("linear_cross_entropy has no second derivative")
    loss_scale, dx, dweight = ctx.saved_tensors
    if dloss is not loss_scale:  # the same tensor has the same value; the host need not read it
        dx, dweight = linear_cross_entropy_bwd(dloss, loss_scale, dx, dweight)
    return dx, dweight, None, None, None, None


_op = custom_op(
    "linear_cross_entropy", linear_cross_entropy_fwd, _fake_fwd, (), _setup_context, _backward
)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *,
    classes: int | None = None, loss_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `eager.linear_cross_entropy`. If `backward` gets the tensor `loss_scale` itself, it
    launches nothing. For any other upstream gradient it reads and rescales dx and dweight."""
    integers, optional = dict(targets=targets), dict(loss_scale=loss_scale)
    checks.tensors(x=x, weight=weight, integers=integers, optional=optional)
    checks.shape("MC", x=x)
    checks.shape(("V", x.shape[1]), weight=weight)
    checks.shape((len(x),), targets=targets)
    checks.shape((), loss_scale=loss_scale)
    V = len(weight)
    classes = V if classes is None else classes
    if not 1 <= classes <= V:
        raise ValueError(f"classes must be in [1, {V}], as weight has {V} rows, got {classes}")
    x, weight = autocast(x, weight)
    checks.same_dtype(x=x, weight=weight)
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if gradient and loss_scale is None and x.dtype == torch.float16:
        loss_scale = x.new_full((), FLOAT16_SCALE, dtype=torch.float32)
    return _op(x, weight, targets, loss_scale, classes, gradient)[0]
