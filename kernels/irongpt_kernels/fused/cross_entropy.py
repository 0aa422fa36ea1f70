"""Mean cross-entropy of logits against class indices, forward and backward.

    loss = cross_entropy(x, t)           x: (M, V)      t: (M,) int64      loss: 0-d float32

Forward, per row:   m = max(x)      rest = sum over v != t of exp(x_v - m)
                    loss_row = log(rest + exp(x_t - m)) - (x_t - m), and 0 where t is ignored
        over rows:  loss = sum(loss_row) / n, where n is the number of rows that are not ignored
Backward, per row:  p_v = exp(x_v - m) / (rest + exp(x_t - m))
                    dx_v = p_v dloss / n      dx_t = (p_t - 1) dloss / n = -sum(the other dx)

Traffic     The forward reads x: MV elements. The backward reads x and writes dx: 2MV. p is not
            saved: it is recomputed from x and from m and rest, 8 bytes per row.
Parallelism In the forward a program handles BLOCK_M rows and loops over V in blocks of BLOCK_N; the
            sum is rescaled whenever m grows. The program stores the sum of its rows' losses and the
            number of rows that are not ignored; one program of a second kernel then adds these
            partial results in a fixed order. The backward needs no reduction and has one program
            per tile.
Precision   float32 between load and store. m and rest are stored separately, because their
            combination m + log(rest + exp(x_t - m)) in one float32 has an error of up to an ulp of
            m, which becomes the relative error of p. rest leaves out the true class. In a confident
            row (p_t near 1) x_t is the maximum m, so the loss is log1p(rest), and p_t - 1 is -rest
            / (rest + 1): neither has a cancellation.
Limits      On the CPU a target outside [0, V) that is not ignore_index raises ValueError. On a GPU
            that check would make the host wait; the loss and the gradient of that row become NaN
            instead. To avoid waiting, the kernels also read dloss and n through pointers.
Spec        irongpt_kernels/eager.py::cross_entropy
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.runtime import checks, launch
from irongpt_kernels.runtime.custom_op import custom_op

MAX_BLOCK = 4096  # columns in registers at a time
TILE = 1024  # elements per program if rows are short: 2 warps
PARTS = 1024  # partial sums that the second kernel reads at a time


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, precise where 1 + x rounds x away (Kahan; Goldberg 1991, thm. 4)."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * tl.div_rn(x, tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _fwd_kernel(
    x_ptr, t_ptr, sums_ptr, counts_ptr, m_ptr, rest_ptr,
    M, V, x_strides, t_stride, ignore_index,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_tile = tl.program_id(0).to(tl.int64)  # int64: M V can exceed 2^31
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t = tl.load(t_ptr + rows * t_stride, mask=rows < M, other=0)
    counted = (rows < M) & (t != ignore_index)
    x_rows = x_ptr + rows * x_strides[0]

    m = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    rest = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, V, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
        mask = counted[:, None] & (cols < V)  # an ignored row may hold inf or NaN
        x = tl.load(x_rows[:, None] + cols * x_strides[1], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(cols < V, x, float("-inf"))  # (BLOCK_M, BLOCK_N)
        m_new = tl.maximum(m, tl.max(x, axis=1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf would be NaN
        e = tl.where(cols == t[:, None], 0.0, tl.exp(x - shift[:, None]))
        rest = rest * tl.exp(m - shift) + tl.sum(e, axis=1)
        m = m_new

    bad = counted & ((t < 0) | (t >= V))
    x_t = tl.load(x_rows + t * x_strides[1], mask=counted & ~bad, other=0.0).to(tl.float32)
    m = tl.where(bad, float("nan"), m)
    below = x_t - m  # 0 where the target has the largest logit
    loss = tl.where(below == 0.0, log1p(rest), tl.log(rest + tl.exp(below)) - below)
    tl.store(sums_ptr + row_tile, tl.sum(tl.where(counted, loss, 0.0), 0))
    tl.store(counts_ptr + row_tile, tl.sum(counted.to(tl.int64), 0))
    tl.store(m_ptr + rows, m, mask=rows < M)
    tl.store(rest_ptr + rows, rest, mask=rows < M)


@triton.jit
def _fwd_mean_kernel(sums_ptr, counts_ptr, loss_ptr, n_ptr, parts, PARTS: tl.constexpr):
    """A single program adds the partial sums and stores the loss and n."""
    total, n = tl.zeros((PARTS,), tl.float32), tl.zeros((PARTS,), tl.int64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(sums_ptr + part, mask=part < parts, other=0.0)
        n += tl.load(counts_ptr + part, mask=part < parts, other=0)
    count = tl.sum(n, 0)
    tl.store(loss_ptr, tl.div_rn(tl.sum(total, 0), count.to(tl.float32)))
    tl.store(n_ptr, count)


@triton.jit
def _bwd_kernel(
    x_ptr, t_ptr, m_ptr, rest_ptr, dloss_ptr, n_ptr, dx_ptr,
    M, V, x_strides, t_stride, ignore_index,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (col_tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    t = tl.load(t_ptr + rows * t_stride, mask=rows < M, other=0)
    counted = (rows < M) & (t != ignore_index)
    x_rows = x_ptr + rows * x_strides[0]
    x_t = tl.load(x_rows + t * x_strides[1], mask=counted & (t >= 0) & (t < V), other=0.0)
    m = tl.load(m_ptr + rows, mask=counted, other=0.0)
    rest = tl.load(rest_ptr + rows, mask=counted, other=0.0)
    total = rest + tl.exp(x_t.to(tl.float32) - m)
    dloss = tl.div_rn(tl.load(dloss_ptr), tl.load(n_ptr).to(tl.float32))
    scale = tl.div_rn(dloss, total)  # (BLOCK_M,)

    mask = counted[:, None] & (cols < V)
    x = tl.load(x_rows[:, None] + cols * x_strides[1], mask=mask, other=float("-inf"))
    e = tl.exp(x.to(tl.float32) - m[:, None])  # (BLOCK_M, BLOCK_N)
    e = tl.where(cols == t[:, None], -rest[:, None], e)
    dx = tl.where(mask, e * scale[:, None], 0.0)  # n = 0 makes the scale infinite
    tl.store(dx_ptr + rows[:, None] * V + cols, dx, mask=(rows < M)[:, None] & (cols < V))


def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Any strides. Returns the loss, 0-d; m and rest, (M,) float32; n, 0-d int64."""
    M, V = logits.shape
    checks.ids(V, ignore_index, targets=targets)  # not in the public function, which is traced
    options = launch.row_options(V, MAX_BLOCK, TILE)
    parts = triton.cdiv(M, options["BLOCK_M"])
    sums, m, rest, loss = (
        logits.new_empty(size, dtype=torch.float32) for size in (parts, M, M, ())
    )
    counts, n = (targets.new_empty(size) for size in (parts, ()))
    if M:
        strides = logits.stride(), targets.stride(0)
        _fwd_kernel[(parts,)](
            logits, targets, sums, counts, m, rest, M, V, *strides, ignore_index, **options
        )
    _fwd_mean_kernel[(1,)](sums, counts, loss, n, parts, PARTS=PARTS, num_warps=4)
    return loss, m, rest, n


def cross_entropy_bwd(
    dloss: Tensor, x: Tensor, t: Tensor, m: Tensor, rest: Tensor, n: Tensor, ignore_index: int
) -> Tensor:
    """dloss: 0-d float32. The others are inputs and results of the forward. Returns dx, (M, V)."""
    M, V = x.shape
    dx = torch.empty((M, V), dtype=x.dtype, device=x.device)
    if M:
        options = launch.row_options(V, MAX_BLOCK, TILE)
        grid = (triton.cdiv(M, options["BLOCK_M"]), triton.cdiv(V, options["BLOCK_N"]))
        _bwd_kernel[grid](
            x, t, m, rest, dloss, n, dx, M, V, x.stride(), t.stride(0), ignore_index, **options
        )
    return dx


def _fake_fwd(logits: Tensor, targets: Tensor, _: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return row.new_empty(()), row, torch.empty_like(row), targets.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, ctx.ignore_index = inputs
    _, m, rest, n = output
    ctx.mark_non_differentiable(m, rest, n)
    ctx.save_for_backward(logits, targets, m, rest, n)
    ctx.set_materialize_grads(False)  # else zeros are allocated for each statistic


def _backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return None, None, None
    return _backward_op(dloss, *ctx.saved_tensors, ctx.ignore_index), None, None


_op = custom_op("cross_entropy", cross_entropy_fwd, _fake_fwd, (), _setup_context, _backward)
_backward_op = custom_op(
    "cross_entropy_backward", cross_entropy_bwd, lambda dloss, x, *_: x.new_empty(x.shape)
)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """See `eager.cross_entropy`."""
    checks.tensors(logits=logits, integers=dict(targets=targets))
    checks.shape("MV", logits=logits)
    checks.shape((len(logits),), targets=targets)
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have at least one class, got shape {tuple(logits.shape)}")
    return _op(logits, targets, ignore_index)[0]
