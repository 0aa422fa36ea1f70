"""The backward of causal attention by one program a head, within the tolerance of eager."""

import contextlib

import pytest
import torch
from extremes import each_extreme, extreme_attention
from fake_gpu import fake_gpu, reset_launch_tables  # noqa: F401
from irongpt_kernels import dropout
from irongpt_kernels.fused import attention, attention_backward, attention_tiles
from irongpt_kernels.runtime import launch, launch_table
from numerics import DEVICE, HALVES, LAYOUTS, assert_op, randn, run
from poison import poison
from torch import Tensor

GPU = torch.device("cuda", 0)
OPTIONS = dict(BLOCK_N=32, num_warps=4, num_stages=1)
# Of one tile of keys or several, and with all rows in one tile or split into halves.
TILINGS = {
    "16 keys, split": dict(BLOCK_N=16, num_warps=1, num_stages=1),
    "16 keys, whole": dict(BLOCK_N=16, num_warps=8, num_stages=1),
    "32 keys, split": dict(BLOCK_N=32, num_warps=2, num_stages=1),
}
each_half = pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture
def tiling(monkeypatch: pytest.MonkeyPatch):
    """Selects the kernel, and its tiles. A T4 has the pair of kernels."""

    def select(options: dict[str, int]) -> None:
        if not launch.INTERPRETED and launch.architecture(torch.device(DEVICE)) < 80:
            pytest.skip("needs compute capability 8.0")
        monkeypatch.setattr(attention_tiles, "head_options", lambda *_: options)

    return select


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backward's functions, in the order of their calls."""
    called: list[str] = []

    class Pair:
        def __getitem__(self, grid: object) -> object:
            return lambda *_, **__: called.append("pair")

    monkeypatch.setattr(attention_backward, "head_bwd", lambda *_: called.append("head"))
    monkeypatch.setattr(attention_backward, "_bwd_dq_kernel", Pair())
    monkeypatch.setattr(attention_backward, "_bwd_dkdv_kernel", Pair())
    return called


def inputs(B: int, H: int, T: int, D: int, dtype: torch.dtype, layout: str = "") -> dict:
    made = (randn(B, H, T, D, seed=i).to(DEVICE, dtype) for i in range(3))
    return {n: LAYOUTS[layout](x) if layout else x for n, x in zip("qkv", made, strict=True)}


def check(x: dict[str, Tensor], dout: Tensor | None = None, **options) -> None:
    """In the interpreter under the sanitizer: no access outside of a tensor, no unwritten value."""
    if dout is None:
        dout = randn(*x["q"].shape, seed=90).to(x["q"])
    clean: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if launch.INTERPRETED:
        from sanitizer import sanitize

        clean = sanitize()
    with clean as report, poison():
        assert_op(attention, "causal_attention", x, (dout,), **options)
    if report is not None:
        assert report.kernels == ["_fwd_kernel", "_bwd_head_kernel"]


@each_half
@pytest.mark.parametrize(
    ("name", "T"),
    [
        *(("16 keys, split", T) for T in (1, 2, 15, 16, 17, 31, 32, 33, 64)),
        *(("16 keys, whole", T) for T in (1, 17, 65)),
        *(("32 keys, split", T) for T in (33, 40, 63, 65)),
    ],
)
def test_every_end_of_a_sequence_in_a_tile(tiling, name: str, T: int, dtype) -> None:
    tiling(TILINGS[name])
    check(inputs(1, 2, T, 16, dtype), **(dict(dropout_p=0.3, seed=5) if T % 2 else {}))


@each_half
@pytest.mark.parametrize("D", [32, 48, 64])
def test_head_dimensions(tiling, D: int, dtype) -> None:
    """A head of 64 columns computes the transposes of dK and dV."""
    tiling(TILINGS["16 keys, split"])
    check(inputs(1, 2, 37, D, dtype), dropout_p=0.2, seed=1)
    check(inputs(1, 1, 20, D, dtype), scale=-0.5)


@each_half
def test_the_longest_context(tiling, dtype) -> None:
    keys = 32 if launch.architecture(torch.device(DEVICE)) >= 90 else 16  # fit the shared memory
    tiling(dict(BLOCK_N=keys, num_warps=8, num_stages=2))
    for T in (250, 256):
        check(inputs(1, 1, T, 64, dtype), dropout_p=0.2, seed=2**33 + 7)


@each_half
@pytest.mark.parametrize("layout", ["transposed", "every second value", "slice of a wider tensor"])
def test_layouts(tiling, layout: str, dtype) -> None:
    tiling(TILINGS["16 keys, split"])
    x = inputs(2, 3, 20, 16, dtype, layout)
    check(x, LAYOUTS["first row expanded"](randn(2, 3, 20, 16, seed=9).to(x["q"])), seed=2**40 + 3)


@each_half
@each_extreme
def test_extreme_values(tiling, kind: str, dtype) -> None:
    tiling(TILINGS["16 keys, split"])
    check(extreme_attention(kind, inputs(1, 2, 40, 16, dtype)))


@each_half
@pytest.mark.parametrize(("factor", "p"), [(1e3, 0.2), (1e-3, 0.2), (1e-3, 0.9)])
def test_large_and_small_upstream_gradients(tiling, factor: float, p: float, dtype) -> None:
    tiling(TILINGS["16 keys, split"])
    dout = (factor * randn(1, 2, 40, 32, seed=9)).to(DEVICE, dtype)
    check(inputs(1, 2, 40, 32, dtype), dout, dropout_p=p, seed=3)


@each_half
def test_the_first_row_has_no_gradient_of_its_scores(tiling, dtype) -> None:
    """It sees one key, so dot(dO, O) and dO V^T are equal but for their rounding."""
    tiling(TILINGS["16 keys, split"])
    x = inputs(2, 2, 33, 64, dtype)
    dout = 50 * randn(2, 2, 33, 64, seed=4).to(x["q"])
    dout[:, :, 1:] = 0
    _, (dq, dk, dv) = run(attention.causal_attention, x, (dout,))
    assert not dq.any()
    assert not dk.any()
    assert torch.equal(dv[:, :, 0], dout[:, :, 0])


@each_half
@pytest.mark.parametrize(("p", "seed"), [(0.001, 0), (0.2, 2**33 + 7), (0.5, -5)])
def test_dropout_has_the_bits_of_eager(tiling, p: float, seed: int, dtype) -> None:
    """Equal scores make a row's weights equal, and the identity as dout shows them in dV."""
    tiling(TILINGS["16 keys, split"])
    B, H, T = 2, 2, 40
    zero = torch.zeros(B, H, T, 48, device=DEVICE, dtype=dtype)
    one = torch.eye(T, 48, device=DEVICE, dtype=dtype).expand(B, H, T, 48)
    _, (_, _, dv) = run(
        attention.causal_attention, dict(q=zero, k=zero, v=one), (one,), dropout_p=p, seed=seed
    )
    wanted = dropout.attention_keep(seed, B, H, T, p, DEVICE).tril()
    assert torch.equal(dv[..., :T].transpose(-2, -1) != 0, wanted)


@each_half
def test_a_packed_projection_in_and_one_packed_gradient_out(tiling, dtype) -> None:
    tiling(TILINGS["16 keys, split"])
    qkv = randn(2, 33, 3, 3, 16, seed=3).to(DEVICE, dtype)
    dout = randn(2, 33, 3, 16, seed=5).to(DEVICE, dtype)
    assert_op(attention, "causal_attention_packed", dict(qkv=qkv), (dout,), dropout_p=0.3, seed=2)
    qkv.requires_grad_()
    (dqkv,) = torch.autograd.grad(attention.causal_attention_packed(qkv), qkv, dout)
    assert dqkv.is_contiguous()


def gradient(T: int = 33, D: int = 64, dtype: torch.dtype = torch.float16) -> None:
    x = torch.zeros(1, 2, T, D, device=DEVICE, dtype=dtype).requires_grad_()
    attention.causal_attention(x, x, x).sum().backward()


def test_where_the_kernel_is_selected(monkeypatch: pytest.MonkeyPatch, launches) -> None:
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


def test_a_measured_tile_is_used_at_its_context_only(monkeypatch: pytest.MonkeyPatch) -> None:
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
