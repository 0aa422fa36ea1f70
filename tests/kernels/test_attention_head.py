"""Where the backward of causal attention is one program per head, and its launch options."""

import pytest
import torch
from fake_gpu import fake_gpu, reset_launch_tables  # noqa: F401
from irongpt_kernels.fused import attention, attention_backward, attention_tiles
from irongpt_kernels.runtime import launch, launch_table
from numerics import DEVICE

GPU = torch.device("cuda", 0)
OPTIONS = dict(BLOCK_N=32, num_warps=4, num_stages=1)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the backward's functions, in the order of their calls."""
    called: list[str] = []

    class Pair:
        def __getitem__(self, grid: object) -> object:
            return lambda *_, **__: called.append("pair")

    monkeypatch.setattr(attention_backward, "head_bwd", lambda *_: called.append("head"))
    monkeypatch.setattr(attention_backward, "_bwd_dq_kernel", Pair())
    monkeypatch.setattr(attention_backward, "_bwd_dkdv_kernel", Pair())
    return called


def gradient(T: int = 33, D: int = 64, dtype: torch.dtype = torch.float16) -> None:
    x = torch.zeros(1, 2, T, D, device=DEVICE, dtype=dtype).requires_grad_()
    attention.causal_attention(x, x, x).sum().backward()


def test_where_the_kernel_is_selected(monkeypatch, launches) -> None:
    """By a launch table's entry on any GPU, if a head fits."""
    gradient()
    device = torch.zeros(1, device=DEVICE).device
    one_kernel = attention_tiles.head_options(device, 33, 64, 2)
    assert launches == (["head"] if one_kernel else ["pair", "pair"])
    launches.clear()
    heads = launch_table.HEADS
    keys = [(head, D, itemsize) for head in heads for D in (64, 128) for itemsize in (2, 4)]
    launch_table.use(device, dict.fromkeys(keys, OPTIONS))
    gradient()
    gradient(T=256)
    gradient(T=128, D=128)
    assert launches == ["head"] * 3
    launches.clear()
    gradient(T=257)
    gradient(T=129, D=128)
    gradient(dtype=torch.float32)
    assert launches == ["pair"] * 6
    launches.clear()
    monkeypatch.setattr(attention_tiles, "MAX_HEAD_CONTEXT", 0)
    gradient()
    assert launches == ["pair"] * 2


def test_a_measured_tile_is_used_at_its_context_only(monkeypatch) -> None:
    """The best tile of 64 positions spills at 256, where the default at D = 32 is the pair."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    fake_gpu(monkeypatch, "NVIDIA H200", (9, 0))
    launch_table.use(GPU, {(attention_tiles.head_entry(64), 32, 2): OPTIONS})
    for T in (1, 32, 33, 64, 65, 128, 129, 256):
        default = attention_tiles.default_head_options(90, T, 32, 2)
        found = attention_tiles.head_options(GPU, T, 32, 2)
        assert found == (OPTIONS if T in (33, 64) else default)
    kernels = {attention_tiles.head_entry(T) for T in range(1, 257)}
    assert kernels == set(launch_table.HEADS)


@pytest.mark.parametrize(
    ("capability", "T", "D", "itemsize", "found"),
    [
        ((9, 0), 256, 64, 2, (32, 8)),
        ((9, 0), 129, 48, 2, (32, 8)),
        ((9, 0), 128, 64, 2, (64, 4)),
        ((9, 0), 1, 16, 2, (64, 4)),
        ((9, 0), 257, 64, 2, None),
        ((9, 0), 256, 32, 2, None),
        ((9, 0), 128, 96, 2, None),
        ((9, 0), 256, 64, 4, None),
        ((8, 0), 256, 64, 2, None),
        ((7, 5), 64, 64, 2, None),
    ],
)
def test_the_default(monkeypatch, capability, T: int, D: int, itemsize: int, found) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    fake_gpu(monkeypatch, "a GPU", capability)
    options = attention_tiles.head_options(GPU, T, D, itemsize)
    assert (options and (options["BLOCK_N"], options["num_warps"])) == found
