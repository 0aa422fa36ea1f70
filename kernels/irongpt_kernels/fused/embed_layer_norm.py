"""The embedding of a sequence and the first layer norm in one pass.

    x, norm = embed_layer_norm(wte, wpe, idx, weight, bias, eps, dtype)

    wte: (V, C)    wpe: (T, C)    idx: (B, T) int64    weight, bias: (C,)    x, norm: (B, T, C)

Forward     x[b, t] = wte[idx[b, t]] + wpe[t]           norm = layer_norm(x), see `layer_norm`
Backward    dx and dnorm are the upstream gradients. `layer_norm_backward` gives dweight, dbias and
            g = dx + the gradient through the norm, the complete gradient with respect to x.
            dwte[v] = sum of g[b, t] where idx[b, t] = v        dwpe[t] = sum of g[b, t] over b

Traffic     The forward writes x and norm: 2MC elements for the M = B T rows; the rows of wte and
            wpe come from L2. The backward reads x and dx and dnorm, the gradients of both results,
            and writes g: 4MC elements. g is then read twice, for dwte and for dwpe.
Parallelism The forward is that of `layer_norm`. For dwte the ids are cut into parts, and there is a
            program for each combination of a token of the vocabulary, a part, and a block of
            BLOCK_N columns: it searches its part of the ids for its token, and sums its columns of
            g over the rows that match. So several programs share the rows of a frequent token.
            `column_sums` adds their partial sums and, in the same launch, the rows of g for dwpe.
            The search makes V M comparisons for each block of columns. So if V exceeds MAX_V, dwte
            and dwpe are computed by PyTorch's kernels instead; that of dwte sorts the ids, in about
            8 launches.
Precision   Loads and stores are in the dtypes of the tensors, arithmetic is in float32. The norm is
            computed from the rounded x, because that is what the backward reads.
Limits      C <= 8192. On the CPU an id outside [0, V) raises ValueError; on a GPU that check would
            make the host wait, and x and norm become NaN there instead.
Spec        irongpt_kernels/eager.py::embed_layer_norm
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.fused.layer_norm import check_shapes, empty_outputs, store_norm
from irongpt_kernels.fused.layer_norm_backward import launch_options, one_row
from irongpt_kernels.fused.norm_parameters import column_sums, norm_gradients
from irongpt_kernels.runtime import checks, launch
from irongpt_kernels.runtime.custom_op import custom_op

MAX_V = 512  # tokens; with more, a sort costs less than the search
PART = 1024  # ids that a program of the backward searches; more if the parts would exceed MAX_PARTS
MAX_PARTS = 64
BLOCK_M = 16  # ids that a program of the backward loads at a time


@triton.jit
def _fwd_kernel(
    wte_ptr, wpe_ptr, idx_ptr, weight_ptr, bias_ptr, x_ptr, norm_ptr, mean_ptr, rstd_ptr,
    M, N, T, V, wte_stride, wpe_stride, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_tile = tl.program_id(0).to(tl.int64)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    valid = (rows < M)[:, None] & (cols < N)[None, :]
    tokens = tl.load(idx_ptr + rows, mask=rows < M, other=0)
    known = ((tokens >= 0) & (tokens < V))[:, None]
    wte_ptrs = wte_ptr + tokens[:, None] * wte_stride + cols[None, :]
    x = tl.load(wte_ptrs, mask=valid & known, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    x = tl.where(known, x, float("nan"))
    wpe_ptrs = wpe_ptr + (rows % T)[:, None] * wpe_stride + cols[None, :]
    x += tl.load(wpe_ptrs, mask=valid, other=0.0).to(tl.float32)
    x = x.to(x_ptr.dtype.element_ty)
    offsets = rows[:, None] * N + cols[None, :]
    tl.store(x_ptr + offsets, x, mask=valid)
    store_norm(
        x.to(tl.float32), valid, rows, cols, offsets, weight_ptr, bias_ptr,
        norm_ptr, mean_ptr, rstd_ptr, M, N, eps,
    )  # fmt: skip


@triton.jit
def _dwte_kernel(
    g_ptr, idx_ptr, sums_ptr, M, N, V, part_rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Stores the sum of a token's rows of g within one part. sums_ptr: (parts, V, N)."""
    token, col_tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    begin = part * part_rows
    for start in range(begin, tl.minimum(begin + part_rows, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        found = (tl.load(idx_ptr + rows, mask=rows < M, other=0) == token) & (rows < M)
        if tl.max(found.to(tl.int32), 0) > 0:
            g_ptrs = g_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
            g = tl.load(g_ptrs, mask=found[:, None] & (cols < N)[None, :], other=0.0)
            total += tl.sum(g.to(tl.float32), 0)
    row = tl.cast(part, tl.int64) * V + token
    tl.store(sums_ptr + row * N + cols, total, mask=cols < N)


def embed_layer_norm_fwd(
    wte: Tensor, wpe: Tensor, idx: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns x in the dtype of wte, norm in `dtype`, contiguous; mean and rstd, (B, T) float32."""
    checks.ids(len(wte), idx=idx)  # not in the public function, which is traced
    outputs = _empty_outputs(wte, idx, dtype)
    M, N, T = idx.numel(), wte.shape[1], idx.shape[1]
    if M and N:
        wte, wpe = launch.contiguous_rows(wte), launch.contiguous_rows(wpe)
        inputs = wte, wpe, idx.contiguous(), one_row(weight), one_row(bias)
        sizes, options = (M, N, T, len(wte)), launch_options(N)
        _fwd_kernel[(triton.cdiv(M, options["BLOCK_M"]),)](
            *inputs, *outputs, *sizes, wte.stride(0), wpe.stride(0), eps, **options
        )
    return outputs


def _empty_outputs(
    wte: Tensor, idx: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialized x, norm, mean and rstd."""
    x = wte.new_empty(*idx.shape, wte.shape[1])
    return x, *empty_outputs(x, dtype)


def embedding_bwd(g: Tensor, idx: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """dwte, (V, N), and dwpe, (T, N), float32. g: (B, T, N), contiguous. idx: (B, T)."""
    B, T, N = g.shape
    M = B * T
    parts = max(1, min(MAX_PARTS, triton.cdiv(M, PART)))
    part_rows = triton.cdiv(triton.cdiv(M, parts), BLOCK_M) * BLOCK_M
    BLOCK_N = min(128, launch.block(N))
    sums = g.new_empty((parts, V * N), dtype=torch.float32)
    if sums.numel():
        _dwte_kernel[(V, triton.cdiv(N, BLOCK_N), parts)](
            g, idx.contiguous(), sums, M, N, V, part_rows,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=1,
        )  # fmt: skip
    dwte, dwpe = column_sums([sums, g.view(B, T * N)])
    return dwte.view(V, N), dwpe.view(T, N)


def _fake_bwd(g: Tensor, idx: Tensor, V: int) -> tuple[Tensor, Tensor]:
    dwte, dwpe = (g.new_empty((n, g.shape[2]), dtype=torch.float32) for n in (V, g.shape[1]))
    return dwte, dwpe


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    wte, _, idx, weight, _, _, ctx.dtype = inputs
    x, _, mean, rstd = output
    ctx.save_for_backward(idx, x, weight, mean, rstd)
    ctx.V = len(wte)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dx: Tensor | None, dnorm: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    idx, *saved = ctx.saved_tensors
    wanted = [False, any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[3:5]]
    gradients = norm_gradients(dx, dnorm, saved, ctx.dtype, wanted)
    g, dweight, dbias = gradients[1:]
    dwte = dwpe = None
    if g is not None and ctx.V > MAX_V:
        dwte = torch.ops.aten.embedding_dense_backward(g, idx, ctx.V, -1, False)
        dwpe = g.sum(0)
    elif g is not None:
        dwte, dwpe = _embedding_backward(g, idx, ctx.V)
    return dwte, dwpe, None, dweight, dbias, None, None


_embedding_backward = custom_op("embedding_backward", embedding_bwd, _fake_bwd)
_op = custom_op(
    "embed_layer_norm", embed_layer_norm_fwd,
    lambda wte, wpe, idx, *rest: _empty_outputs(wte, idx, rest[-1]), (), _setup_context, _backward,
)  # fmt: skip


def embed_layer_norm(
    wte: Tensor, wpe: Tensor, idx: Tensor, weight: Tensor, bias: Tensor | None = None,
    eps: float = 1e-5, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `eager.embed_layer_norm`."""
    integers, optional = dict(idx=idx), dict(bias=bias)
    checks.tensors(wte=wte, wpe=wpe, weight=weight, integers=integers, optional=optional)
    checks.shape("VC", wte=wte)
    check_shapes(weight, bias, wte=wte)
    checks.shape(("T", wte.shape[1]), wpe=wpe)
    checks.shape(("B", len(wpe)), idx=idx)
    checks.same_dtype(wte=wte, wpe=wpe)
    x, norm, _, _ = _op(wte, wpe, idx, weight, bias, eps, dtype or wte.dtype)
    return x, norm
