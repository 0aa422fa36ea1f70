"""The dropout masks of `dropout` for Triton kernels: same seed and position, same bits.

The formulas are written for each element. Of the 16 elements that share a call of the generator, a
thread mostly holds 8 in 16-bit attention, and 8 or 4 in `row_keep` (see Layout in `dropout`). The
compiler merges the calls of a thread if it sees that their counters are equal; `attention_keep`
makes that visible by broadcasting one counter to all of them. `python -m irongpt_kernels.aot` shows
how many elements a call then serves.
"""

import triton
import triton.language as tl

from irongpt_kernels import dropout

ROUNDS = tl.constexpr(dropout.ROUNDS)


@triton.jit
def attention_keep(
    seed, head, row, col, M: tl.constexpr, N: tl.constexpr, threshold,
    TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """The keep mask of a tile of attention weights, int1, (M, N), or TRANSPOSED (N, M).

    seed: int64 scalar. head: b H + h. row, col: the first of the tile, multiples of M and of N.
    M, N: powers of two, 8 or more. threshold: `dropout.threshold(p)`.
    """
    c0, word = _counters(row, M)
    c1, byte = _counters(col, N)
    if TRANSPOSED:
        c0, word, c1, byte = c0[None, :], word[None, :], c1[:, None], byte[:, None]
    else:
        c0, word, c1, byte = c0[:, None], word[:, None], c1[None, :], byte[None, :]
    c0, c1 = tl.broadcast(c0, c1)
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + head, zero, ROUNDS)
    word += zero
    # `word` is the number of the row's group of 8. A thread's registers hold rows r and r + 8 of a
    # fragment, so the compiler knows word % 2 of each register and removes the last tl.where. The
    # choice by word < 2, which can depend on the warp, comes first.
    even, odd = tl.where(word < 2, w0, w2), tl.where(word < 2, w1, w3)
    bits = tl.where(word % 2 == 0, even, odd)
    return ((bits >> (byte * 8 + zero).to(tl.uint32)) & 0xFF).to(tl.int32) >= threshold


@triton.jit
def _counters(start, L: tl.constexpr):
    """For L consecutive rows (or columns) from `start`, two (L,) tensors: the counter word c0 (or
    c1), and the number, 0 to 3, of the group of 8 rows within 32.

    Rows that share a counter get it by a broadcast, so that a thread computes it, and all that
    depends on it, once.
    """
    TILES: tl.constexpr = L // 32 if L > 32 else 1
    GROUPS: tl.constexpr = 4 if L > 32 else L // 8
    tile, group = tl.arange(0, TILES)[:, None, None], tl.arange(0, GROUPS)[None, :, None]
    counter = tile * 8 + tl.arange(0, 8)[None, None, :]
    counter = tl.reshape(tl.broadcast_to(counter, (TILES, GROUPS, 8)), (L,))
    group = tl.reshape(tl.broadcast_to(group, (TILES, GROUPS, 8)), (L,))
    if L < 32:
        group += start // 8 % 4
    return start // 32 * 8 + counter, group


@triton.jit
def row_keep(seed, rows, cols, threshold):
    """The keep mask of a matrix, int1, in the shape that rows and cols broadcast to.

    rows: int64 indices, cols: int32; they broadcast. seed, threshold: as in `attention_keep`.
    """
    c0, row = tl.broadcast(cols // 16, rows)
    zero = tl.zeros_like(c0)
    low = (row & 0xFFFFFFFF).to(tl.uint32)
    high = (row >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, low, high, zero + 1, ROUNDS)
    word = cols // 4 % 4 + zero
    bits = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    shift = (cols % 4 * 8 + zero).to(tl.uint32)
    return ((bits >> shift) & 0xFF).to(tl.int32) >= threshold
