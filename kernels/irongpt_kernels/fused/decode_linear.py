"""The linear layers of one decoding step, fused with what precedes or follows them.

    norm_linear(x, weight, norm_weight, norm_bias, bias, gelu)      gelu(norm(x) weight^T + bias)
    linear_add(x, weight, residual, bias)                           residual + x weight^T + bias

    x: (M, K) with few rows    weight: (N, K)    residual, result: (M, N)

Forward, per row:   1. the layer norm, rounded to the dtype of the weight
                    2. the matmul, summed in float32
                    3. without GELU, the bias is added, and the sum is rounded to the dtype of the
                       weight; with GELU, the result of the matmul is rounded to that dtype, and
                       bias and GELU are then applied in float32
                    4. the residual is added in float32
                    A model under autocast rounds at the same places, but it also writes the
                    intermediate results to memory.

Traffic     reads the weight once, N K elements, which takes nearly all of the time. Every program
            computes the layer norm of all rows again, while its part of the weight is being loaded.
Parallelism A program holds BLOCK_N rows of the weight in registers and applies them to all rows of
            x. It issues the loads of the weight first.
Precision   float32 between load and store, apart from the two roundings above. The matmul uses
            scalar instructions, because so few rows do not fill a tensor core.
Limits      x has at most MAX_M rows and MAX_K columns; for larger inputs the ops call our layer
            norm, PyTorch's matmul and our GELU one after another. No gradient.
Spec        irongpt_kernels/eager.py::norm_linear, linear_add
"""

from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels import eager
from irongpt_kernels.fused.gelu import gelu as gelu_op
from irongpt_kernels.fused.gelu import gelu_factors
from irongpt_kernels.fused.layer_norm import layer_norm
from irongpt_kernels.runtime import checks, launch
from irongpt_kernels.runtime.custom_op import custom_op

MAX_M, MAX_K = 4, 4096


@triton.jit
def _norm(x, weight_ptr, bias_ptr, k, K, eps):
    """The layer norm of one row, (BLOCK_K,). It does not call the functions of `layer_norm`: they
    take a matrix, and for a matrix of one row Triton 3.9 generates slow code, in which every thread
    computes the whole sum."""
    x = tl.where(k < K, x - tl.sum(x, 0) / K, 0.0)
    x = tl.where(k < K, x - tl.sum(x, 0) / K, 0.0)  # the rounding error of the mean
    x *= tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    x *= tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return x


@triton.jit
def _fwd_kernel(
    x_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, K, x_stride, weight_stride, residual_stride, eps,
    GELU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """norm_weight_ptr, norm_bias_ptr, bias_ptr, residual_ptr: None to leave out that step."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (n < N)[:, None] & (k < K)[None, :]
    weight_ptrs = weight_ptr + n[:, None] * weight_stride + k[None, :]
    weight = tl.load(weight_ptrs, mask=inside, other=0.0)  # (BLOCK_N, BLOCK_K)
    for row in range(M):
        at = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + at * x_stride + k, mask=k < K, other=0.0).to(tl.float32)  # (BLOCK_K,)
        if norm_weight_ptr is not None:
            x = _norm(x, norm_weight_ptr, norm_bias_ptr, k, K, eps).to(weight.dtype).to(tl.float32)
        y = tl.sum(weight.to(tl.float32) * x[None, :], 1)  # (BLOCK_N,)
        if not GELU and bias_ptr is not None:
            bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)
            y += bias.to(weight.dtype).to(tl.float32)
        y = y.to(weight.dtype).to(tl.float32)
        if GELU:
            if bias_ptr is not None:
                y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
            s, _, _ = gelu_factors(y)
            y = y * s
        if residual_ptr is not None:
            y += tl.load(residual_ptr + at * residual_stride + n, mask=n < N).to(tl.float32)
        tl.store(y_ptr + at * N + n, y, mask=n < N)


def _empty_output(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    residual = rest[3]
    return (weight if residual is None else residual).new_empty(len(x), len(weight))


def decode_linear_fwd(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, gelu: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Returns (M, N) in the dtype of the residual, or without it in that of the weight."""
    y = _empty_output(x, weight, norm_weight, norm_bias, bias, residual)
    (M, K), N = x.shape, len(weight)
    if y.numel():
        x, weight = launch.contiguous_rows(x), launch.contiguous_rows(weight)
        residual = None if residual is None else launch.contiguous_rows(residual)
        options = _launch_options(N, K)
        _fwd_kernel[(triton.cdiv(N, options["BLOCK_N"]),)](
            x, weight, *map(launch.contiguous, (norm_weight, norm_bias, bias)), residual, y,
            M, N, K, x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0),
            eps, GELU=gelu, **options,
        )  # fmt: skip
    return y


def _launch_options(N: int, K: int) -> dict[str, int]:
    """Small tiles, so that even the weight of a small model occupies many SMs."""
    BLOCK_K = launch.block(K)
    BLOCK_N = 8 if N >= 1024 and BLOCK_K <= 1024 else 4
    if launch.INTERPRETED:  # its time grows with the number of programs
        BLOCK_N = min(1024, max(16, triton.next_power_of_2(N) // 64))
    num_warps = 8 if BLOCK_N * BLOCK_K > 8192 else 4
    options = dict(BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=num_warps)
    return options | launch.no_fusion_in_narrow_rows(BLOCK_K, num_warps)


_op = custom_op("decode_linear", decode_linear_fwd, _empty_output)


def norm_linear(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor | None = None,
    bias: Tensor | None = None, *,
    gelu: bool = False, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """See `eager.norm_linear`."""
    vectors = dict(norm_bias=norm_bias, bias=bias)
    checks.tensors(x=x, weight=weight, norm_weight=norm_weight, optional=vectors)
    M, K, _ = _sizes(x, weight, bias)
    checks.shape((K,), norm_weight=norm_weight, norm_bias=norm_bias)
    if M <= MAX_M and K <= MAX_K:
        return _op(x, weight, norm_weight, norm_bias, bias, None, gelu, eps)
    normed = layer_norm(x, norm_weight, norm_bias, eps).to(weight.dtype)
    if gelu:
        return gelu_op(F.linear(normed, weight), bias)
    return F.linear(normed, weight, None if bias is None else bias.to(weight.dtype))


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `eager.linear_add`."""
    checks.tensors(x=x, weight=weight, residual=residual, optional=dict(bias=bias))
    M, K, N = _sizes(x, weight, bias)
    checks.shape((M, N), residual=residual)
    checks.same_dtype(weight=weight, x=x)
    if M <= MAX_M and K <= MAX_K:
        return _op(x, weight, None, None, bias, residual, False, 0.0)
    return eager.linear_add(x, weight, residual, bias)


def _sizes(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int, int]:
    """Returns M, K and N. Raises ValueError unless the shapes match."""
    checks.shape("MK", x=x)
    checks.shape(("N", x.shape[1]), weight=weight)
    checks.shape((len(weight),), bias=bias)
    return *x.shape, len(weight)
