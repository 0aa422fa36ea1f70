"""The embedding of a sequence and the first layer norm in one pass.

    x, norm = embed_layer_norm(wte, wpe, idx, weight, bias, eps, dtype)

    wte: (V, C)    wpe: (T, C)    idx: (B, T) int64    weight, bias: (C,)    x, norm: (B, T, C)

Forward     x[b, t] = wte[idx[b, t]] + wpe[t]           norm = layer_norm(x), see `layer_norm`
Backward    `layer_norm_backward` gives dweight, dbias and g = dx + the gradient through the norm
            dwte[v] = sum of g[b, t] where idx[b, t] = v        dwpe[t] = sum of g[b, t] over b

Traffic     The forward writes x and norm: 2MC elements for the M = B T rows; the rows of wte and
            wpe come from L2. The backward reads dx, dnorm and x and writes g, the total gradient
            with respect to x, 4MC; it reads g twice more, for dwte and dwpe.
Parallelism The forward is that of `layer_norm`. For dwte a program searches a part of the ids for
            one token, and adds BLOCK_N columns of the rows of g that belong to it, so that a
            frequent token has several programs. `column_sums` adds their partial sums and, in the
            same launch, the rows of g for dwpe. There are no atomics, so every run gives the same
            bits. The search compares V M ids, so for a vocabulary larger than MAX_V PyTorch's
            kernels compute both gradients: dwte by sorting the ids, in about 8 launches.
Precision   Loads and stores are in the dtypes of the tensors, arithmetic is in float32. The norm is
            computed from x after it is rounded to its dtype.
Limits      C <= 8192. On the CPU an id outside [0, V) raises ValueError; on a GPU that check would
            make the host wait, and x and norm become NaN there instead.
Spec        irongpt_kernels/eager.py::embed_layer_norm
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.fused.layer_norm import affine, check_shapes, normalize
from irongpt_kernels.fused.layer_norm_backward import launch_options, one_row
from irongpt_kernels.fused.norm_parameters import column_sums, norm_gradients
from irongpt_kernels.runtime import checks, launch
from irongpt_kernels.runtime.custom_op import custom_op
from irongpt_kernels.runtime.launch import contiguous_rows

MAX_V = 512  # tokens; with more, a sort costs less than V M comparisons
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
    mean, rstd, xhat = normalize(x.to(tl.float32), valid, N, eps)
    tl.store(norm_ptr + offsets, affine(xhat, weight_ptr, bias_ptr, cols, N), mask=valid)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


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


def _checked_fwd(
    wte: Tensor, wpe: Tensor, idx: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if idx.device.type == "cpu":  # not in the public function: a traced tensor has no values
        bad = idx[(idx < 0) | (idx >= len(wte))]
        if bad.numel():
            raise ValueError(f"idx must be in [0, {len(wte)}), got {int(bad[0])}")
    return embed_layer_norm_fwd(wte, wpe, idx, weight, bias, eps, dtype)


def embed_layer_norm_fwd(
    wte: Tensor, wpe: Tensor, idx: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns x in the dtype of wte, norm in `dtype`, contiguous; mean and rstd, (B, T) float32."""
    outputs = _empty_outputs(wte, idx, dtype)
    M, N, T = idx.numel(), wte.shape[1], idx.shape[1]
    if M and N:
        wte, wpe = contiguous_rows(wte), contiguous_rows(wpe)
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
    size = *idx.shape, wte.shape[1]
    mean, rstd = (wte.new_empty(idx.shape, dtype=torch.float32) for _ in range(2))
    return wte.new_empty(size), wte.new_empty(size, dtype=dtype), mean, rstd


def embedding_bwd(g: Tensor, idx: Tensor, V: int, wanted: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """dwte, (V, N), and dwpe, (T, N), float32. g: (B, T, N), contiguous. idx: (B, T). wanted:
    whether to compute dwte and dwpe; one that is not wanted is returned empty."""
    B, T, N = g.shape
    M = B * T
    dwte, dwpe = _empty_gradients(g, idx, V, [False, False])
    matrices = []
    if wanted[0]:
        parts = max(1, min(MAX_PARTS, triton.cdiv(M, PART)))
        part_rows = triton.cdiv(triton.cdiv(M, parts), BLOCK_M) * BLOCK_M
        BLOCK_N = min(128, launch.block(N))
        sums = torch.empty((parts, V, N), dtype=torch.float32, device=g.device)
        grid = V, triton.cdiv(N, BLOCK_N), parts
        if sums.numel():
            _dwte_kernel[grid](
                g, idx.contiguous(), sums, M, N, V, part_rows,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=1,
            )  # fmt: skip
        matrices.append(sums.view(parts, V * N))
    if wanted[1]:
        matrices.append(g.view(B, T * N))
    totals = iter(column_sums(matrices))
    if wanted[0]:
        dwte = next(totals).view(V, N)
    if wanted[1]:
        dwpe = next(totals).view(T, N)
    return dwte, dwpe


def _empty_gradients(
    g: Tensor, idx: Tensor, V: int, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Uninitialized dwte and dwpe."""
    dwte, dwpe = (
        g.new_empty((n, g.shape[2]) if want else 0, dtype=torch.float32)
        for n, want in zip((V, idx.shape[1]), wanted, strict=True)
    )
    return dwte, dwpe


_embedding_backward = custom_op("embedding_backward", embedding_bwd, _empty_gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    wte, _, idx, weight, bias, _, dtype = inputs
    x, _, mean, rstd = output
    ctx.save_for_backward(x, idx, weight, mean, rstd)
    ctx.V = wte.shape[0]
    ctx.dtypes = dtype, weight.dtype if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dx: Tensor | None, dnorm: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dx is None and dnorm is None:
        return (None,) * 7
    x, idx, weight, mean, rstd = ctx.saved_tensors
    embeddings, parameters = list(ctx.needs_input_grad[:2]), list(ctx.needs_input_grad[3:5])
    if dnorm is None:
        parameters = [False, False]  # x does not depend on them
    wanted = [False, any(embeddings), *parameters]
    g, dweight, dbias = norm_gradients(
        dx, dnorm, x, weight, mean, rstd, None, 0.0, ctx.dtypes, wanted
    )[1:]
    dwte, dwpe = (None, None) if g is None else _embedding_gradients(g, idx, ctx.V, embeddings)
    return dwte, dwpe, None, dweight, dbias, None, None


def _embedding_gradients(
    g: Tensor, idx: Tensor, V: int, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of wte and wpe in the dtype of g; None for one that is not wanted."""
    if V > MAX_V:
        dwte = torch.ops.aten.embedding_dense_backward(g, idx, V, -1, False) if wanted[0] else None
        return dwte, g.sum(0) if wanted[1] else None
    gradients = _embedding_backward(g, idx, V, wanted)
    dwte, dwpe = (
        d.to(g.dtype) if want else None for d, want in zip(gradients, wanted, strict=True)
    )
    return dwte, dwpe


_op = custom_op(
    "embed_layer_norm", _checked_fwd,
    lambda wte, wpe, idx, *rest: _empty_outputs(wte, idx, rest[-1]), (), _setup_context, _backward,
)  # fmt: skip


def embed_layer_norm(
    wte: Tensor, wpe: Tensor, idx: Tensor, weight: Tensor, bias: Tensor | None = None,
    eps: float = 1e-5, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `eager.embed_layer_norm`. Raises as `layer_norm`, TypeError unless idx is int64, and on
    the CPU ValueError for an id outside the vocabulary."""
    checks.floating(wte=wte, wpe=wpe, weight=weight, optional=dict(bias=bias))
    checks.rank("wte", wte, 2)
    checks.int64(idx=idx)
    check_shapes(wte, weight, bias, "wte")
    checks.rank("wpe", wpe, 2)
    checks.shape("wpe", wpe, (wpe.shape[0], wte.shape[1]))
    checks.rank("idx", idx, 2)
    checks.shape("idx", idx, (idx.shape[0], wpe.shape[0]))
    checks.same_dtype(wte=wte, wpe=wpe)
    checks.same_device(wte=wte, idx=idx)
    x, norm, _, _ = _op(wte, wpe, idx, weight, bias, eps, dtype or wte.dtype)
    return x, norm
