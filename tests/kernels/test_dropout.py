"""The masks: known bits, the table in the docstring of `dropout`, and statistics."""

import numpy as np
import pytest
import torch
from irongpt_kernels import dropout
from torch import Tensor

M32 = 0xFFFFFFFF
SEEDS = [
    pytest.param(0, id="zero"),
    pytest.param(1337, id="small"),
    pytest.param((1337 << 32) + 42, id="both words of the key"),
    pytest.param(-(2**40) - 7, id="negative"),
    pytest.param(2**63 - 1, id="largest"),
]


def philox(key: int, counter: list[int], rounds: int = 7) -> list[int]:
    """Philox4x32 in Python's integers, written from the paper, one counter at a time."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & M32, key >> 32 & M32
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return [c0, c1, c2, c3]


def byte(words: list[int], k: int) -> int:
    return b"".join(word.to_bytes(4, "little") for word in words)[k]


def attention_byte(seed: int, head: int, row: int, col: int) -> int:
    """The left column of the table in dropout's docstring."""
    c0, c1 = 8 * (row // 32) + row % 8, 8 * (col // 32) + col % 8
    return byte(philox(seed, [c0, c1, head, 0]), 4 * (row // 8 % 4) + col // 8 % 4)


def row_byte(seed: int, row: int, col: int) -> int:
    """The right column."""
    return byte(philox(seed, [col // 16, row & M32, row >> 32, 1]), col % 16)


@pytest.mark.parametrize(
    ("word", "seed", "wanted"),
    [
        pytest.param(0, 0, "5f6fb709 0d893f64 4f121f81 4f730a48", id="zeros"),
        pytest.param(M32, -1, "5207ddc2 45165e59 4d8ee751 8c52f662", id="ones"),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(word: int, seed: int, wanted: str) -> None:
    """kat_vectors of Random123, philox4x32 of 7 rounds."""
    c = torch.tensor(word)
    for key in (seed, torch.tensor(seed)):
        got = dropout.philox(key, c, c, c, c)
        assert " ".join(f"{int(x):08x}" for x in got) == wanted
    assert [int(x, 16) for x in wanted.split()] == philox(seed, [word] * 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_follow_the_table(seed: int) -> None:
    B, H, T, M, N, p = 3, 2, 70, 40, 37, 0.3
    for key in (seed, torch.tensor(seed)):
        keep, rows = dropout.attention_keep(key, B, H, T, p), dropout.row_keep(key, M, N, p)
        assert (keep.shape, keep.dtype) == ((B, H, T, T), torch.bool)
        assert (rows.shape, rows.dtype) == ((M, N), torch.bool)
        rng = np.random.default_rng(1)
        for b, h, row, col in zip(*(rng.integers(0, n, 200) for n in keep.shape), strict=True):
            wanted = attention_byte(seed, int(b) * H + int(h), int(row), int(col)) >= 77
            assert keep[b, h, row, col] == wanted, (b, h, row, col)
        for row, col in zip(rng.integers(0, M, 200), rng.integers(0, N, 200), strict=True):
            assert rows[row, col] == (row_byte(seed, int(row), int(col)) >= 77), (row, col)


def test_rows_past_2_to_the_32_go_on_counting(monkeypatch) -> None:
    M, N, first = 6, 20, 2**32 - 3
    arange = torch.arange

    def shifted(*args, **kwargs) -> Tensor:
        return arange(*args, **kwargs) + (first if args == (M,) else 0)

    monkeypatch.setattr(torch, "arange", shifted)
    keep = dropout.row_keep(9, M, N, 0.5)
    wanted = [[row_byte(9, first + r, col) >= 128 for col in range(N)] for r in range(M)]
    assert keep.tolist() == wanted


def test_a_bit_depends_on_its_position_alone() -> None:
    whole = dropout.attention_keep(5, 2, 3, 256, 0.2)
    assert torch.equal(whole[:, :, :100, :100], dropout.attention_keep(5, 2, 3, 100, 0.2))
    assert torch.equal(whole[:1], dropout.attention_keep(5, 1, 3, 256, 0.2))
    assert torch.equal(whole.flatten(0, 1)[None], dropout.attention_keep(5, 1, 6, 256, 0.2))
    rows = dropout.row_keep(5, 64, 384, 0.2)
    assert torch.equal(rows[:50, :100], dropout.row_keep(5, 50, 100, 0.2))
    assert torch.equal(rows, dropout.row_keep(5, 64, 384, 0.2))


@pytest.mark.parametrize(
    ("p", "wanted"),
    [
        pytest.param(0.0, 0, id="nothing is dropped"),
        pytest.param(1e-9, 1, id="asked for, so at least 1/256"),
        pytest.param(0.2, 51, id="the model's: rounded down"),
        pytest.param(0.3, 77, id="rounded up"),
        pytest.param(0.5, 128, id="exact"),
        pytest.param(0.999999, 255, id="something is always kept"),
    ],
)
def test_the_rate_is_a_number_of_256ths(p: float, wanted: int) -> None:
    assert dropout.threshold(p) == wanted
    assert dropout.keep_scale(p) * (256 - wanted) / 256 == pytest.approx(1, rel=1e-15)
    assert (dropout.row_keep(3, 64, 64, p).all()) == (p == 0)


def step_seed(run_seed: int, microstep: int, n_layer: int) -> int:
    return (run_seed << 32) + microstep * 3 * n_layer


def test_all_masks_of_a_run_differ() -> None:
    """Layers x heads x batch x 100 steps: the first 32 x 32 bits of each, and of every branch."""
    n_layer, B, H = 6, 4, 6
    attention, branch = set(), set()
    for step in range(100):
        for layer in range(n_layer):
            seed = step_seed(1337, step, n_layer) + 3 * layer
            bits = dropout.attention_keep(seed, B, H, 32, 0.2).view(B * H, -1)
            attention.update(row.tobytes() for row in bits.numpy())
            branch.update(dropout.row_keep(seed + i, 8, 128, 0.2).numpy().tobytes() for i in (1, 2))
    assert len(attention) == 100 * n_layer * B * H
    assert len(branch) == 100 * n_layer * 2
    assert not attention & branch


def test_the_keep_rate_of_every_mask_is_within_5_sigma() -> None:
    p, T = 0.2, 128
    rate = 1 - 51 / 256
    sigma = (rate * (1 - rate)) ** 0.5
    for step in (0, 1, 99):
        for layer in range(6):
            seed = step_seed(1337, step, 6) + 3 * layer
            heads = dropout.attention_keep(seed, 2, 6, T, p).double().mean((2, 3))
            assert (heads - rate).abs().max() < 5 * sigma / T
            rows = dropout.row_keep(seed + 1, 512, 384, p).double()
            assert (rows.mean() - rate).abs() < 5 * sigma / (512 * 384) ** 0.5
            assert (rows.mean(0) - rate).abs().max() < 5 * sigma / 512**0.5
            assert (rows.mean(1) - rate).abs().max() < 5 * sigma / 384**0.5


def correlated(x: Tensor, y: Tensor) -> bool:
    """Whether the drops of two masks of p = 1/2 go together more than 5 sigma."""
    product = (x.double() * 2 - 1) * (y.double() * 2 - 1)
    return bool(product.sum().abs() > 5 * product.numel() ** 0.5)


@pytest.mark.parametrize("step", [1, 4, 8, 16, 24, 32, 64])
def test_neighbours_are_independent(step: int) -> None:
    """Steps of the layout: bytes of a word, words of a call, calls of a tile, tiles."""
    masks = dropout.attention_keep(3, 2, 3, 256, 0.5)
    rows = dropout.row_keep(3, 1024, 384, 0.5)
    for mask in (masks, rows):
        assert not correlated(mask[..., step:, :], mask[..., :-step, :])
        assert not correlated(mask[..., step:], mask[..., :-step])
        assert not correlated(mask[..., step:, step:], mask[..., :-step, :-step])
    i, j = torch.triu_indices(256, 256, step)
    assert not correlated(masks[..., i, j], masks[..., j, i])


def test_heads_layers_and_steps_are_independent() -> None:
    first = step_seed(1337, 0, 6)
    masks = dropout.attention_keep(first, 2, 3, 256, 0.5)
    assert not correlated(masks[0], masks[1])
    assert not correlated(masks[:, 0], masks[:, 1])
    assert not correlated(masks[:, 0], masks[:, 2])
    others = {
        "next dropout": first + 1,
        "next layer": first + 3,
        "next step": step_seed(1337, 1, 6),
        "next run": step_seed(1338, 0, 6),
    }
    rows = dropout.row_keep(first, 512, 768, 0.5)
    for name, seed in others.items():
        assert not correlated(masks, dropout.attention_keep(seed, 2, 3, 256, 0.5)), name
        assert not correlated(rows, dropout.row_keep(seed, 512, 768, 0.5)), name
    assert not correlated(masks.flatten(), rows.flatten())
