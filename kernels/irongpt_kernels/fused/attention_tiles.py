"""Tile loads and stores of (B, H, T, D) tensors with any strides, and the tile sizes per GPU."""

import functools

import torch
import triton
import triton.language as tl

from irongpt_kernels.runtime import launch, launch_table


@triton.jit
def load_tile(
    ptr, strides, b, h, start, T,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_T: tl.constexpr,
):  # fmt: skip
    """Returns BLOCK_T rows of head (b, h) from `start` on, (BLOCK_T, BLOCK_D), 0 beyond column D.

    CHECK_T: the tile can extend beyond row T, and is 0 there.
    """
    rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_T)
    ptrs, cols = _pointers(ptr, strides, b, h, rows, BLOCK_D)
    if CHECK_T:
        tile = tl.load(ptrs, mask=(rows < T)[:, None] & (cols < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(
    tile, ptr, strides, b, h, start, T,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores a tile where `load_tile` would load it, cast to the dtype of the tensor."""
    rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_T)
    ptrs, cols = _pointers(ptr, strides, b, h, rows, BLOCK_D)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(rows < T)[:, None] & (cols < D)[None, :])


@triton.jit
def load_stats(m_ptr, log_l_ptr, at, mask, EXACT: tl.constexpr):
    """Returns m and log2(l) of the rows. Unless EXACT, the first result is m + log2(l), rounded,
    and the second is not used."""
    m = tl.load(m_ptr + at, mask=mask, other=0.0)
    log_l = tl.load(log_l_ptr + at, mask=mask, other=0.0)
    if not EXACT:
        m += log_l
    return m, log_l


@triton.jit
def weights(s, m, log_l, EXACT: tl.constexpr):
    """Returns P = 2^(s - m) / l. s: scores times log2(e). m, log_l: see `load_stats`."""
    return tl.exp2((s - m) - log_l) if EXACT else tl.exp2(s - m)


@triton.jit
def _pointers(ptr, strides, b, h, rows, BLOCK_D: tl.constexpr):
    # int64 throughout: in a transposed layout any of the four strides can be the largest.
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    base = ptr + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]
    return base + rows[:, None] * strides[2] + cols[None, :] * strides[3], cols


# The longest context for `attention_head_backward`. Longer ones take the pair of kernels in
# `attention_backward`. Tests set it to 0 to test the pair at any length.
MAX_HEAD_CONTEXT = 256


def head_options(
    device: torch.device, T: int, D: int, itemsize: int
) -> launch_table.Options | None:
    """The launch options of `attention_head_backward`; BLOCK_N is the number of keys of a tile.
    None selects `attention_backward`'s pair of kernels."""
    if not _fits(T, D, itemsize):
        return None
    arch = 0 if launch.INTERPRETED else launch.architecture(device)
    return launch_table.options(
        head_entry(T), D, itemsize, device, default_head_options(arch, T, D, itemsize)
    )


def head_entry(T: int) -> str:
    """The key of `attention_head_backward` in `launch_table`. The code depends on the context only
    through the power of two `launch.block(T)`."""
    return f"attention head {launch.block(T)}"


def _fits(T: int, D: int, itemsize: int) -> bool:
    """Whether `attention_head_backward` supports these sizes: a program holds dQ in registers."""
    return itemsize == 2 and T <= MAX_HEAD_CONTEXT and launch.block(T) * launch.block(D) <= 256 * 64


def default_head_options(arch: int, T: int, D: int, itemsize: int) -> launch_table.Options | None:
    """Default launch options per architecture; None if the pair of kernels is the default.

    They are chosen as in `default_tiles`. On sm_80 the reads of shared memory limit the single
    kernel: each warp reads the complete right operand of every matmul. By the cost model of
    `aot.tiles`, these reads take longer at 256 positions than the DRAM traffic of the pair, so the
    pair is the default on sm_80. On sm_90 wgmma, an asynchronous matmul, reads that operand once
    for four warps. There the single kernel is the default in 16 bits, for D = 48 and 64 up to 256
    positions, and for D = 16 and 32 up to 128. All other sizes take the pair. A wgmma needs 64
    rows. The rows of the matmuls of dK and dV are the keys of a tile, and above 128 positions a
    tile has only 32. For D = 48 and 64 the kernel computes dK^T and dV^T instead, whose rows are
    the head dimension, padded to 64. With smaller D these have too few rows as well. On sm_75 the
    64 KB of shared memory hold too little of a head.
    """
    if arch != 90 or D > 64 or (T > 128 and launch.block(D) < 64) or not _fits(T, D, itemsize):
        return None
    BLOCK_N, num_warps = (32, 8) if T > 128 else (64, 4)
    return dict(BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=2)


def launch_options(kernel: str, device: torch.device, D: int, itemsize: int) -> dict[str, int]:
    """The launch options of a kernel: BLOCK_M queries, BLOCK_N keys, its warps and stages.

    kernel: forward, query (delta, dQ) or key (dK, dV). Options that `irongpt tune` has measured on
    this GPU replace those of `default_tiles`.
    """
    if launch.INTERPRETED:  # small tiles reach every boundary case on short inputs
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1)
    default = default_tiles(kernel, launch.architecture(device), launch.block(D), itemsize)
    return launch_table.options(f"attention {kernel}", D, itemsize, device, default)


@functools.cache  # called at every launch; no caller changes the result
def default_tiles(kernel: str, arch: int, BLOCK_D: int, itemsize: int) -> dict[str, int]:
    """Default launch options per architecture, chosen with `python -m irongpt_kernels.aot.tiles`.

    The criteria are, in this order: no spills, at least 8 warps per SM, fewest clocks. On sm_75 the
    bottleneck is shared memory, and a warp of 32 rows reads each key half as often as two warps of
    16. From sm_80 on the bottleneck at short contexts is DRAM, or on sm_90 the ALU work of dropout
    masks. So from sm_80 on, tiles of 128 rows, which read the keys less often, gain nothing. At T =
    256 they compute a fifth more scores, because a larger part of them is masked.

    maxnreg: the limit of registers per thread. It replaces ptxas's own choice, in both directions.
    It is set in two cases. Where ptxas would choose more registers, the limit lets an SM hold 12
    warps instead of 8. Where it would choose fewer so that more warps fit, and would spill for
    that, the value lets it use more.
    """
    if itemsize == 4 and BLOCK_D > 64:  # scalar float32 matmuls, whose operands fill the registers
        forward = (32, 16, 4 if arch < 80 else 8)
        tile = {"forward": forward, "query": (16, 16, 8), "key": (16, 32, 4)}[kernel]
    elif itemsize == 4:
        tile = (32, 16, 4)
    elif arch < 80 and BLOCK_D > 64:
        tile = {"forward": (128, 32, 8), "query": (32, 32, 2), "key": (16, 32, 2)}[kernel]
    elif arch < 80:
        warps = 2 if BLOCK_D == 64 else 4
        tile = {"forward": (64, 32, warps), "query": (64, 32, 4), "key": (32, 64, 4)}[kernel]
    elif kernel == "key":
        tile = (32, 64, 4)
    else:
        tile = (64, 32 if BLOCK_D > 64 or kernel == "query" else 64, 4)
    # Below sm_80 there are no asynchronous copies, so a second stage would only take memory. With
    # two accumulators (dK, dV) or float32 operands, D above 64 leaves no registers for the
    # addresses of a second stage; with both, D = 64 leaves none either.
    wide = BLOCK_D > 64 or (BLOCK_D == 64 and itemsize == 4)
    crowded = wide and (kernel == "key" or (itemsize == 4 and BLOCK_D > 64))
    num_stages = 1 if arch < 80 or crowded else 2
    BLOCK_M, BLOCK_N, num_warps = tile
    options = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages)
    limited = (("forward", 64),) if arch == 90 else (("forward", 32), ("query", 64))
    if arch >= 80 and itemsize == 2 and (kernel, BLOCK_D) in limited:
        options["maxnreg"] = 168  # so three programs of 4 warps fit the 65,536 registers of an SM
    return options
