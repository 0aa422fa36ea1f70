"""The dropout masks of `dropout` for Triton kernels: same seed and position, same bits.

The formulas are written for each element. Elements that share a call of the generator are in one
thread (see the layout in `dropout`), and the compiler merges their calls where it sees that their
counters are equal. `python -m irongpt_kernels.aot` shows how many elements a call then serves.
"""

import triton
import triton.language as tl


@triton.jit
def attention_keep(seed, head, rows, cols, threshold, row0=None, UNSIGNED: tl.constexpr = True):
    """The keep mask of attention weights, int1, in the shape that rows and cols broadcast to.

    seed: int64 scalar. head: b H + h. rows, cols: int32 indices that broadcast, such as (M, 1) and
    (1, N). threshold: `dropout.threshold(p)`. row0: is added to the rows, which are then
    `tl.arange(0, M)`, and is a multiple of M. UNSIGNED: // and % become shifts and masks, in which
    the compiler finds equal counters; no bit of the mask changes.
    """
    if UNSIGNED:
        rows, cols = rows.to(tl.uint32), cols.to(tl.uint32)
    c0 = rows // 32 * 8 + rows % 8
    if row0 is not None:
        c0 += row0 // 32 * 8
    c1 = cols // 32 * 8 + cols % 8
    c0, c1 = tl.broadcast(c0, c1)
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + head, zero, 7)
    word = rows // 8 % 4 + zero
    if row0 is not None and rows.numel < 32:  # else row0 is a multiple of 32
        word += row0 // 8 % 4
    bits = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    shift = (cols // 8 % 4 * 8 + zero).to(tl.uint32)
    return ((bits >> shift) & 0xFF).to(tl.int32) >= threshold


@triton.jit
def row_keep(seed, rows, cols, threshold):
    """The keep mask of a matrix, int1, in the shape that rows and cols broadcast to.

    rows: int64 indices, cols: int32; they broadcast. seed, threshold: as in `attention_keep`.
    """
    c0, row = tl.broadcast(cols // 16, rows)
    zero = tl.zeros_like(c0)
    low = (row & 0xFFFFFFFF).to(tl.uint32)
    high = (row >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, low, high, zero + 1, 7)
    word = cols // 4 % 4 + zero
    bits = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    shift = (cols % 4 * 8 + zero).to(tl.uint32)
    return ((bits >> shift) & 0xFF).to(tl.int32) >= threshold
