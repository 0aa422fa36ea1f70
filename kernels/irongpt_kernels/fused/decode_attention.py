"""Attention of one new position per sequence to itself and to the cached keys and values before it.

    out = decode_attention(qkv, cache_k, cache_v, position, scale)

    qkv: (B, 1, 3, H, D)    caches: (B, H, N, D)    position: (B,) int64    out: (B, 1, H, D)

Per head, with p = position:    cache_k[p], cache_v[p] = k, v       S = scale q cache_k[:p+1]^T
                                out = softmax(S) cache_v[:p+1]

Traffic     reads p rows of both caches, q, k and v; writes k, v and out: 2 p D + 6 D elements
            per head.
Parallelism one program per head. It starts its online softmax from the new key and value in
            registers, so it never reads a cache row that it has just written. A tile of keys is as
            large as registers allow; in 16 bits one tile has all keys of the default context, so
            the program waits for memory only once.
Precision   Dot products, softmax and sums are in float32. Exponentials have base e: there are too
            few of them for base 2 to save time.
Limits      D is a multiple of 16 from 16 to 128. No gradient. Cache rows after `position` are not
            read. A position outside the cache writes nothing, since a kernel cannot raise.
Spec        irongpt_kernels/eager.py::decode_attention
"""

import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.runtime import checks, launch
from irongpt_kernels.runtime.custom_op import custom_op

TILE = 16_384  # elements of a tile of keys in 16 bits, 64 per thread; float32 has half


@triton.jit
def _fwd_kernel(
    qkv_ptr, k_ptr, v_ptr, position_ptr, out_ptr,
    qkv_strides, k_strides, v_strides, position_stride, H, N, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    position = tl.load(position_ptr + b * position_stride)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = d < D
    new_ptrs = qkv_ptr + b * qkv_strides[0] + h * qkv_strides[3] + d * qkv_strides[4]
    q = tl.load(new_ptrs, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(new_ptrs + qkv_strides[2], mask=inside, other=0.0)
    v = tl.load(new_ptrs + 2 * qkv_strides[2], mask=inside, other=0.0)
    k_ptrs = k_ptr + b * k_strides[0] + h * k_strides[1] + d * k_strides[3]
    v_ptrs = v_ptr + b * v_strides[0] + h * v_strides[1] + d * v_strides[3]
    in_cache = inside & (position >= 0) & (position < N)
    tl.store(k_ptrs + position * k_strides[2], k, mask=in_cache)
    tl.store(v_ptrs + position * v_strides[2], v, mask=in_cache)

    m = tl.sum(q * k.to(tl.float32), 0) * scale
    l = 1.0  # noqa: E741
    acc = v.to(tl.float32)
    for start in range(0, tl.minimum(position, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = n < tl.minimum(position, N)
        mask = seen[:, None] & inside[None, :]
        keys = tl.load(k_ptrs[None, :] + n[:, None] * k_strides[2], mask=mask, other=0.0)
        values = tl.load(v_ptrs[None, :] + n[:, None] * v_strides[2], mask=mask, other=0.0)
        s = tl.sum(keys.to(tl.float32) * q[None, :], 1) * scale
        s = tl.where(seen, s, float("-inf"))  # (BLOCK_N,)
        m_new = tl.maximum(m, tl.max(s, 0))
        p = tl.exp(s - m_new)
        rescale = tl.exp(m - m_new)
        l = l * rescale + tl.sum(p, 0)  # noqa: E741
        acc = acc * rescale + tl.sum(p[:, None] * values.to(tl.float32), 0)
        m = m_new
    out = tl.div_rn(acc, l).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head * D + d, out, mask=inside)


def decode_attention_fwd(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor, scale: float
) -> Tensor:
    """Any strides. Returns out, (B, 1, H, D), contiguous. Both caches are updated in place."""
    B, _, _, H, D = qkv.shape
    N = cache_k.shape[2]
    out = qkv.new_empty(B, 1, H, D)
    if out.numel() == 0:
        return out
    _fwd_kernel[(B * H,)](
        qkv, cache_k, cache_v, position, out,
        qkv.stride(), cache_k.stride(), cache_v.stride(), position.stride(0), H, N,
        scale, D=D, **_launch_options(N, D, qkv.element_size()),
    )  # fmt: skip
    return out


def _launch_options(N: int, D: int, itemsize: int) -> dict[str, int]:
    BLOCK_D = launch.block(D)
    most = TILE // BLOCK_D // (2 if itemsize == 4 else 1)
    if launch.INTERPRETED:  # several tiles even on short inputs
        most = 16
    options = dict(BLOCK_N=min(launch.block(N), most), BLOCK_D=BLOCK_D, num_warps=8)
    return options | launch.no_fusion_in_narrow_rows(BLOCK_D, 8)


_op = custom_op(
    "decode_attention", decode_attention_fwd,
    lambda qkv, *_: qkv.new_empty(len(qkv), 1, *qkv.shape[3:]), mutates=("cache_k", "cache_v"),
)  # fmt: skip


def decode_attention(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor, *, scale: float | None = None
) -> Tensor:
    """See `eager.decode_attention`."""
    integers = dict(position=position)
    checks.tensors(qkv=qkv, cache_k=cache_k, cache_v=cache_v, integers=integers)
    checks.shape(("B", 1, 3, "H", "D"), qkv=qkv)
    B, _, _, H, D = qkv.shape
    checks.shape((B, H, "N", D), cache_k=cache_k)
    checks.shape(cache_k.shape, cache_v=cache_v)
    checks.shape((B,), position=position)
    checks.head_dimension("qkv", qkv)
    checks.same_dtype(qkv=qkv, cache_k=cache_k, cache_v=cache_v)
    return _op(qkv, cache_k, cache_v, position, D**-0.5 if scale is None else float(scale))
