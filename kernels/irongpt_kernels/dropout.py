"""
Counter-based dropout masks: pure functions of (p, seed, position), independent of the tiling.

A mask bit comes from Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), a keyed bijection of a 128-bit counter: the key is the seed, and the counter is the
position of a group of 16 elements. Nothing is stored between forward and backward: both compute the
bits they need.

Cost        7 rounds, the fewest that pass BigCrush in that paper, take about 70 integer
            instructions and give 128 bits. One byte decides one element, so one call can serve 16
            elements. On a T4 a call for each element would take longer than the attention's memory
            traffic.
Layout      A kernel computes the counter of each element as in the table below. Elements with the
            same counter need one call of Philox only, and the compiler merges the equal calls of a
            GPU thread. In attention a 32 x 32 tile needs 64 calls, one for each r and c from 0 to
            7. The call (r, c) serves the 4 x 4 elements in rows r, r + 8, r + 16, r + 24 and
            columns c, c + 8, c + 16, c + 24. A thread of a tensor core's accumulator has, of each 8
            columns, two neighbours, which belong to two calls. If two warps share the 32 rows, as
            in most tiles, a thread uses 8 of the 16 bytes of a call, and another thread repeats the
            call. The same holds for the transposed tile, which the backward uses. In float32,
            without tensor cores, a thread uses fewer. In dropout before a residual add, a call
            covers columns 16j to 16j + 15 of a row. A thread holds 8 neighbouring columns of 16-bit
            tensors, or 4 of float32, so it uses 8 or 4 of the 16 bytes; other threads repeat the
            call.
Rate        A byte gives probabilities in steps of 1/256, so p is rounded: 0.2 becomes 51/256 =
            0.1992, and a p above 0 becomes at least 1/256 and at most 255/256. Kept elements are
            scaled by the reciprocal of the rounded keep rate, so that the expectation is exact.

| word of the counter | attention element (b, h, row, col) | row element (row, col) |
|---|---|---|
| c0 | 8 (row // 32) + row % 8 | col // 16 |
| c1 | 8 (col // 32) + col % 8 | row, low 32 bits |
| c2 | b H + h | row, high 32 bits |
| c3 | 0 | 1 |
| byte of the 16 | 4 (row // 8 % 4) + col // 8 % 4 | col % 16 |

Byte k is bits 8 (k % 4) to 8 (k % 4) + 7 of output word k // 4. The key is the low and the high
32 bits of the seed.
"""

import torch
from torch import Tensor

ROUNDS = 7
_M32 = 0xFFFFFFFF


def philox(
    seed: int | Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, ...]:
    """Philox4x32-7 of the counters (int64 tensors that broadcast, values below 2^32).

    Returns the 4 output words as int64 tensors below 2^32. The product of two 32-bit words can wrap
    around in int64, but the shift and mask after it still extract the right bits.
    """
    w0, w1, w2, w3 = torch.broadcast_tensors(c0, c1, c2, c3)
    k0, k1 = seed & _M32, (seed >> 32) & _M32
    for _ in range(ROUNDS):
        a, b = w0 * 0xD2511F53, w2 * 0xCD9E8D57
        w0, w1 = ((b >> 32) & _M32) ^ w1 ^ k0, b & _M32
        w2, w3 = ((a >> 32) & _M32) ^ w3 ^ k1, a & _M32
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return w0, w1, w2, w3


def check(p: float) -> None:
    """Raises ValueError unless 0 <= p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}")


def threshold(p: float) -> int:
    """p in units of 1/256: a byte below it drops its element. Raises as `check`."""
    check(p)
    return min(max(round(256 * p), 1), 255) if p > 0 else 0


def keep_scale(p: float) -> float:
    """The factor of kept elements: the reciprocal of the keep rate after rounding."""
    return 256 / (256 - threshold(p))


def attention_keep(
    seed: int | Tensor, B: int, H: int, T: int, p: float, device: torch.device | str = "cpu"
) -> Tensor:
    """The keep mask of attention weights: bool, (B, H, T, T), rows are queries."""
    tiles = -(-T // 32)
    c = torch.arange(8 * tiles, device=device)  # the values of c0 and of c1
    head = torch.arange(B * H, device=device)
    words = philox(seed, c[:, None], c[None, :], head[:, None, None], head.new_zeros(()))
    random_bytes = _bytes(words)  # (B H, c0, c1, 16)
    # A row is 32 tile + 8 i + r with i < 4 and r < 8, and a column likewise.
    random_bytes = random_bytes.view(B, H, tiles, 8, tiles, 8, 4, 4)
    random_bytes = random_bytes.permute(0, 1, 2, 6, 3, 4, 7, 5).reshape(
        B, H, 32 * tiles, 32 * tiles
    )
    return random_bytes[:, :, :T, :T] >= threshold(p)


def row_keep(
    seed: int | Tensor, M: int, N: int, p: float, device: torch.device | str = "cpu"
) -> Tensor:
    """The keep mask of a matrix: bool, (M, N)."""
    group = torch.arange(-(-N // 16), device=device)
    row = torch.arange(M, device=device)[:, None]
    words = philox(seed, group, row & _M32, row >> 32, row.new_ones(()))
    return _bytes(words).flatten(1)[:, :N] >= threshold(p)


def _bytes(words: tuple[Tensor, ...]) -> Tensor:
    """Splits 4 words into 16 bytes, int64, in a new last dimension."""
    shifts = torch.arange(0, 32, 8, device=words[0].device)
    return ((torch.stack(words, -1)[..., None] >> shifts) & 0xFF).flatten(-2)
