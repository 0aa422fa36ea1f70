"""What the attention kernels share: tiles of (B, H, T, D) tensors in any strides, their sizes."""

import functools

import torch
import triton
import triton.language as tl

from irongpt_kernels.runtime import launch, launch_table


@triton.jit
def load_tile(
    ptr, strides, b, h, start, T,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Rows start to start + BLOCK_T of head (b, h): (BLOCK_T, BLOCK_D), 0 beyond column D.

    BOUNDED: the tile may reach beyond row T, and is 0 there.
    """
    rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_T)
    ptrs, cols = _pointers(ptr, strides, b, h, rows, BLOCK_D)
    if BOUNDED:
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
    """Writes what `load_tile` would read, in the dtype of the memory."""
    rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_T)
    ptrs, cols = _pointers(ptr, strides, b, h, rows, BLOCK_D)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(rows < T)[:, None] & (cols < D)[None, :])


@triton.jit
def load_stats(m_ptr, log_l_ptr, at, seen, EXACT: tl.constexpr):
    """m and log2(l) of rows. Unless EXACT, m is their rounded sum."""
    m = tl.load(m_ptr + at, mask=seen, other=0.0)
    log_l = tl.load(log_l_ptr + at, mask=seen, other=0.0)
    if not EXACT:
        m += log_l
    return m, log_l


@triton.jit
def weights(s, m, log_l, EXACT: tl.constexpr):
    """P = 2^(s - m) / l, of scores to base 2 and what `load_stats` gave."""
    return tl.exp2((s - m) - log_l) if EXACT else tl.exp2(s - m)


@triton.jit
def _pointers(ptr, strides, b, h, rows, BLOCK_D: tl.constexpr):
    # int64 throughout: in a transposed layout any of the four strides may be the big one.
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    base = ptr + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]
    return base + rows[:, None] * strides[2] + cols[None, :] * strides[3], cols


def tiles(kernel: str, device: torch.device, D: int, itemsize: int) -> dict[str, int]:
    """The launch of a kernel: BLOCK_M queries, BLOCK_N keys, and its warps and stages.

    kernel: forward, query (delta, dQ) or key (dK, dV). Measured on this GPU where `tuned` has it.
    """
    if launch.INTERPRETED:  # many small tiles: every boundary case, on short inputs
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1)
    shipped = table(kernel, launch.architecture(device), launch.block(D), itemsize)
    return launch_table.options(f"attention {kernel}", D, itemsize, device, shipped)


@functools.cache  # a launch asks for it: nobody changes what it returns
def table(kernel: str, arch: int, BLOCK_D: int, itemsize: int) -> dict[str, int]:
    """The launch for a GPU: what fits its registers and shared memory, chosen by compiling.

    By `python -m irongpt_kernels.aot.tiles`: no spills, then 8 warps an SM, then clocks. On sm_75
    a warp of 32 rows reads each key half as often as two of 16, and shared memory is what binds.
    From sm_80 on DRAM binds at short contexts, or on sm_90 the ALU that makes dropout's masks:
    tiles of 128 rows read keys less often, but see more of the diagonal, a fifth more work at 256.

    maxnreg: registers a thread may have, where a limit lets an SM hold half as many warps again, or
    keeps ptxas from spilling a few for even more of them.
    """
    if itemsize == 4 and BLOCK_D > 64:  # products of float32 are scalar, and fill the registers
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
    # Below sm_80 nothing is copied asynchronously, and a second stage is memory for nothing. Two
    # accumulators of wide heads, or float32 ones, leave no registers for its addresses.
    wide = BLOCK_D > 64 or (BLOCK_D == 64 and itemsize == 4)
    crowded = wide and (kernel == "key" or (itemsize == 4 and BLOCK_D > 64))
    num_stages = 1 if arch < 80 or crowded else 2
    BLOCK_M, BLOCK_N, num_warps = tile
    found = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages)
    three = (("forward", 64),) if arch == 90 else (("forward", 32), ("query", 64))
    if arch >= 80 and itemsize == 2 and (kernel, BLOCK_D) in three:
        found["maxnreg"] = 168  # three programs of 4 warps fit the 65,536 of an SM
    return found
