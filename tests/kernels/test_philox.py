"""The masks in Triton against the table of `dropout`'s docstring, far beyond an op's sizes."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from irongpt_kernels import dropout
from irongpt_kernels.fused import philox
from numerics import DEVICE
from test_dropout import attention_byte, row_byte

SEED, THRESHOLD = -(2**40) - 7, 77


@triton.jit
def _rows_kernel(keep_ptr, seed_ptr, first, threshold, M: tl.constexpr, N: tl.constexpr):
    i, cols = tl.arange(0, M), tl.arange(0, N)
    rows = first + i.to(tl.int64)
    keep = philox.row_keep(tl.load(seed_ptr), rows[:, None], cols[None, :], threshold)
    tl.store(keep_ptr + i[:, None] * N + cols[None, :], keep)


@triton.jit
def _attention_kernel(
    keep_ptr, seed_ptr, head, row, col, threshold, M: tl.constexpr, N: tl.constexpr
):
    i, j = tl.arange(0, M), tl.arange(0, N)
    seed = tl.load(seed_ptr)
    keep = philox.attention_keep(seed, head, row, col, M, N, threshold)
    tl.store(keep_ptr + i[:, None] * N + j[None, :], keep)
    keep = philox.attention_keep(seed, head, row, col, M, N, threshold, TRANSPOSED=True)
    tl.store(keep_ptr + M * N + i[None, :] * N + j[:, None], keep)


@triton.jit
def _words_kernel(counters_ptr, words_ptr, seed, N: tl.constexpr):
    at = tl.arange(0, N)
    c = counters_ptr + at
    words = tl.philox(seed, tl.load(c), tl.load(c + N), tl.load(c + 2 * N), tl.load(c + 3 * N), 7)
    for i in tl.static_range(4):
        tl.store(words_ptr + i * N + at, words[i].to(tl.uint32, bitcast=True).to(tl.int64))


def test_philox_is_tritons() -> None:
    """A kernel may call tl.philox: the same 7 rounds, the same key from a seed."""
    seed, N = (77 << 32) + 5, 256
    counters = np.random.default_rng(0).integers(0, 2**32, (4, N), dtype=np.uint32)
    words = torch.empty(4, N, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](torch.from_numpy(counters.view(np.int32)).to(DEVICE), words, seed, N)
    wanted = dropout.philox(seed, *torch.from_numpy(counters.astype(np.int64)))
    assert torch.equal(words.cpu(), torch.stack(wanted))


@pytest.mark.parametrize("first", [0, 2**31 - 3, 2**32 - 3, 2**40 - 3])
def test_rows_past_2_to_the_32_go_on_counting(first: int) -> None:
    M, N = 8, 32
    keep = torch.empty(M, N, dtype=torch.bool, device=DEVICE)
    _rows_kernel[(1,)](keep, torch.tensor(SEED, device=DEVICE), first, THRESHOLD, M, N)
    wanted = [[row_byte(SEED, first + r, c) >= THRESHOLD for c in range(N)] for r in range(M)]
    assert keep.tolist() == wanted


@pytest.mark.parametrize(("M", "N"), [(16, 16), (32, 16), (8, 64)])
@pytest.mark.parametrize(("head", "row", "col"), [(0, 0, 0), (5, 3, 60), (2**31 - 1, 9999, 7)])
def test_attention_far_from_the_first_head_and_tile(
    head: int, row: int, col: int, M: int, N: int
) -> None:
    row, col = row * M, col * N
    keep = torch.empty(2, M, N, dtype=torch.bool, device=DEVICE)
    seed = torch.tensor(SEED, device=DEVICE)
    _attention_kernel[(1,)](keep, seed, head, row, col, THRESHOLD, M, N)
    wanted = [
        [attention_byte(SEED, head, row + r, col + c) >= THRESHOLD for c in range(N)]
        for r in range(M)
    ]
    assert keep.tolist() == [wanted] * 2
