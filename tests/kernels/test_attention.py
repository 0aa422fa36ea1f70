"""Causal attention by Triton kernels, within the tolerance of eager. Also the packed op."""

import contextlib

import pytest
import torch
from irongpt_kernels import builtin, dropout
from irongpt_kernels.fused import attention, attention_tiles
from irongpt_kernels.runtime import launch
from numerics import DEVICE, DTYPES, HALVES, LAYOUTS, assert_op, each_dtype, randn, run
from torch import Tensor

# Queries and keys of a tile: forward, dQ, dK and dV.
TILINGS = {
    "one tiling": [(32, 32), (32, 32), (32, 32)],
    "three tilings": [(32, 16), (16, 32), (64, 16)],
    "three more": [(16, 64), (64, 32), (16, 32)],
}
LARGE = {"large, for the interpreter": [(128, 256), (256, 128), (128, 256)]}
# Keys of a tile of the single kernel, and whether it splits the queries into halves.
HEAD_TILINGS = {
    "16 keys, split": dict(BLOCK_N=16, num_warps=1, num_stages=1),
    "16 keys, whole": dict(BLOCK_N=16, num_warps=8, num_stages=1),
    "32 keys, split": dict(BLOCK_N=32, num_warps=2, num_stages=1),
}
each_half = pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d).removeprefix("torch."))
# The backward by a pair of kernels, and by a single one in 16 bits.
each_backward = pytest.mark.parametrize(
    ("backward", "dtype"),
    [*(("pair", d) for d in DTYPES), *(("head", d) for d in HALVES)],
    ids=lambda x: str(x).removeprefix("torch."),
    indirect=["backward"],
)


@pytest.fixture
def tiling(monkeypatch):
    """Sets the tiles of the three kernels."""

    def set_tiles(name: str) -> None:
        sizes = dict(zip(["forward", "query", "key"], (TILINGS | LARGE)[name], strict=True))

        def tiles(kernel: str, *_: object) -> dict[str, int]:
            M, N = sizes[kernel]
            return dict(BLOCK_M=M, BLOCK_N=N, num_warps=4, num_stages=1)

        monkeypatch.setattr(attention_tiles, "launch_options", tiles)

    return set_tiles


@pytest.fixture
def select_head(monkeypatch):
    """Selects the single kernel, and its tiles. A T4 has the pair of kernels."""

    def select(options: dict[str, int]) -> None:
        if not launch.INTERPRETED and launch.architecture(torch.device(DEVICE)) < 80:
            pytest.skip("needs compute capability 8.0")
        monkeypatch.setattr(attention_tiles, "head_options", lambda *_: options)

    return select


@pytest.fixture
def backward(request, monkeypatch, select_head) -> str:
    if request.param == "head":
        select_head(HEAD_TILINGS["16 keys, split"])
    else:
        monkeypatch.setattr(attention_tiles, "MAX_HEAD_CONTEXT", 0)
    return request.param


def inputs(B: int, H: int, T: int, D: int, dtype=torch.float32, factor: float = 1) -> dict:
    q, k, v = ((factor * randn(B, H, T, D, seed=i)).to(DEVICE, dtype) for i in range(3))
    return dict(q=q, k=k, v=v)


def check(x: dict[str, Tensor], dout: Tensor | None = None, **options) -> None:
    """In the interpreter the single kernel runs under the sanitizer, as the pair does in
    `test_sanitizer`: no access outside of a tensor."""
    q = x["q"]
    if dout is None:
        dout = randn(*q.shape, seed=90).to(q)
    clean: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if launch.INTERPRETED and attention_tiles.head_options(q.device, *q.shape[2:], q.itemsize):
        from sanitizer import sanitize

        clean = sanitize()
    with clean as launched:
        assert_op(attention, "causal_attention", x, (dout,), **options)
    if launched is not None:
        assert launched == ["_fwd_kernel", "_bwd_head_kernel"]


@each_dtype
@pytest.mark.parametrize(
    ("tiles", "T"),
    [
        *(("one tiling", T) for T in (1, 2, 16, 17, 31, 32, 33, 64, 65)),
        *(("three tilings", T) for T in (1, 17, 33, 64, 65)),
        *(("three more", T) for T in (2, 31, 65)),
    ],
)
def test_every_end_of_a_sequence_in_a_tile(tiling, tiles: str, T: int, dtype) -> None:
    """Of one tile, several, and of tiles that cross the diagonal elsewhere."""
    tiling(tiles)
    options = dict(dropout_p=0.3, seed=5) if dtype == torch.float32 and T > 64 else {}
    check(inputs(1, 1, T, 16, dtype), **options)


@each_half
@pytest.mark.parametrize(
    ("name", "T"),
    [
        *(("16 keys, split", T) for T in (1, 2, 15, 16, 17, 31, 32, 33, 64)),
        *(("16 keys, whole", T) for T in (1, 17, 65)),
        *(("32 keys, split", T) for T in (33, 40, 63, 65)),
    ],
)
def test_every_end_of_a_sequence_in_a_tile_of_the_single_kernel(
    select_head, name: str, T: int, dtype
) -> None:
    select_head(HEAD_TILINGS[name])
    check(inputs(1, 2, T, 16, dtype), **(dict(dropout_p=0.3, seed=5) if T % 2 else {}))


@each_half
def test_the_longest_context_of_the_single_kernel(select_head, dtype) -> None:
    keys = 32 if launch.architecture(torch.device(DEVICE)) >= 90 else 16  # fit the shared memory
    select_head(dict(BLOCK_N=keys, num_warps=8, num_stages=2))
    for T in (250, 256):
        check(inputs(1, 1, T, 64, dtype), dropout_p=0.2, seed=2**33 + 7)


@each_backward
@pytest.mark.parametrize("layout", ["transposed", "every second value", "slice of a wider tensor"])
def test_layouts(backward, layout: str, dtype) -> None:
    x = {n: LAYOUTS[layout](x) for n, x in inputs(2, 3, 20, 16, dtype).items()}
    check(x, LAYOUTS["first row expanded"](randn(2, 3, 20, 16, seed=9).to(x["q"])), seed=2**40 + 3)


@pytest.mark.parametrize(
    ("T", "dtype"),
    [(255, torch.float16), (256, torch.float32), (400, torch.float32)],
    ids=str,
)
def test_long_sequences(tiling, T: int, dtype) -> None:
    if launch.INTERPRETED:
        tiling("large, for the interpreter")
    check(inputs(1, 1, T, 16, dtype), dropout_p=0.1, seed=1)


def test_scores_of_hundreds_and_their_transpose_have_the_same_bits() -> None:
    """The forward's weights, and those that the key kernel computes from transposed scores.

    One rounding of a score of 400 changes a weight by 4e-5 of itself.
    """
    T, D = 48, 16
    q, k = 10 + randn(1, 1, T, D), 10 + randn(1, 1, T, D, seed=1) / 20
    q, k = (x.to(DEVICE, torch.float32) for x in (q, k))
    forward, backward = (torch.zeros(T, T, device=DEVICE) for _ in range(2))
    for first in range(0, T, D):
        part = slice(first, first + D)
        unit = torch.eye(T, device=DEVICE)[None, None, :, part].contiguous()
        (out,), (_, _, dv) = run(attention.causal_attention, dict(q=q, k=k, v=unit), (unit,))
        forward[:, part], backward[part] = out[0, 0], dv[0, 0].T
    scores = (q[0, 0] @ k[0, 0].T) * D**-0.5
    assert scores.min() > 300
    large = forward > 0.01
    assert large.sum() > T
    assert ((forward - backward).abs() / forward)[large].max() < 4e-6


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("T", [256, 1000, 4096])
def test_the_heads_of_the_presets_at_every_length(T: int, dtype) -> None:
    B, H = (1, 2) if T == 4096 else (2, 3)  # else eager's float64 takes 7 GB, half of a T4
    check(inputs(B, H, T, 64, dtype), dropout_p=0.2, seed=1)


@each_backward
@pytest.mark.parametrize("D", [32, 48, 64, 80, 96, 112, 128])
def test_head_dimensions(backward, D: int, dtype) -> None:
    """In the single kernel a head of 64 columns computes the transposes of dK and dV."""
    if D <= 64 or backward == "pair":
        check(inputs(1, 2, 37, D, dtype), dropout_p=0.2, seed=1)


@each_backward
@pytest.mark.parametrize("scale", [0.3, 1.0, 0.0, -0.5])
def test_scale(backward, scale: float, dtype) -> None:
    check(inputs(1, 1, 20, 32, dtype), scale=scale)


@each_backward
def test_a_packed_projection_in_and_one_packed_gradient_out(backward, dtype) -> None:
    """Of several heads and sequences, which do not mix."""
    B, H, T, D = 2, 3, 37, 16
    packed = randn(B, T, 3, H, D).to(DEVICE, dtype)
    x = dict(zip("qkv", packed.permute(2, 0, 3, 1, 4), strict=True))
    check(x, dropout_p=0.2, seed=4)
    out, *gradients = run_op(x, randn(B, H, T, D, seed=1).to(packed))
    assert out.shape == (B, H, T, D)
    assert out.transpose(1, 2).is_contiguous()
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == 1
    assert [g.stride() for g in gradients] == [t.stride() for t in x.values()]


def run_op(x: dict[str, Tensor], dout: Tensor, **options) -> list[Tensor]:
    (out,), gradients = run(attention.causal_attention, x, (dout,), **options)
    return [out, *gradients]


def one_winner(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Scores to the edge of float16, one column far above the others."""
    k = k.clone()
    k[:, :, 20] = q[:, :, 30] * 40
    return q * 40, k, v


EXTREMES = {
    "large logits": lambda q, k, v: (q * 15, k * 15, v),
    "equal": lambda q, k, v: (
        torch.full_like(q, 1.5),
        torch.full_like(k, 1.5),
        v,
    ),  # with v dq would be 0
    "one winner": one_winner,
    "large values": lambda q, k, v: (q, k, v * 1e3),
    "small": lambda q, k, v: (q * 1e-3, k * 1e-3, v * 1e-3),
}


@each_backward
@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_values(backward, kind: str, dtype) -> None:
    q, k, v = EXTREMES[kind](**inputs(1, 2, 40, 16, dtype))
    check(dict(q=q, k=k, v=v))


def test_float32_scores_of_any_size() -> None:
    """Scores of 1e30: every row takes one column, and no exponent overflows."""
    x = inputs(1, 1, 40, 16)
    x["q"], x["k"] = x["q"] * 1e15, x["k"] * 1e15
    check(x)


@each_backward
def test_the_only_score_of_the_first_row_has_no_gradient(backward, dtype) -> None:
    """Its weight is 1, whatever the score, although delta and dP are rounded differently."""
    dout = 50 * randn(2, 3, 40, 64, seed=9).to(DEVICE, dtype)
    dout[:, :, 1:] = 0
    _, dq, dk, dv = run_op(inputs(2, 3, 40, 64, dtype), dout)
    assert not dq.any()
    assert not dk.any()
    assert torch.equal(dv[:, :, 0], dout[:, :, 0])


@each_backward
@pytest.mark.parametrize(("factor", "p"), [(1e3, 0.2), (1e-3, 0.2), (1e-3, 0.9), (1e3, 0.0)])
def test_large_and_small_upstream_gradients(backward, factor: float, p: float, dtype) -> None:
    """A loss scale of 65536 makes them large: neither dP nor dS may leave float16's range."""
    dout = (factor * randn(1, 2, 40, 64, seed=9)).to(DEVICE, dtype)
    check(inputs(1, 2, 40, 64, dtype), dout, dropout_p=p, seed=3)


@each_dtype
def test_later_positions_have_no_effect(dtype) -> None:
    """What later positions hold, NaN included, changes no earlier row of the output."""
    x, T = inputs(1, 2, 70, 16, dtype), 64
    before = attention.causal_attention(**x)
    for t in x.values():
        t[:, :, T:] = float("nan")
    assert torch.equal(attention.causal_attention(**x)[:, :, :T], before[:, :, :T])


@each_backward
@pytest.mark.parametrize(("p", "seed"), [(0.001, 0), (0.2, 2**33 + 7), (0.2, -5), (0.5, -5)])
def test_dropout_has_the_bits_of_eager(backward, p: float, seed: int, dtype) -> None:
    """In the forward and in dV: equal scores make a row's weights equal, and v the identity shows
    them; so does dout for dV."""
    B, H, T, D = 2, 2, 40, 48
    zero = torch.zeros(B, H, T, D, device=DEVICE, dtype=dtype)
    one = torch.eye(T, D, device=DEVICE, dtype=dtype).expand(B, H, T, D)
    (out,), (_, _, dv) = run(
        attention.causal_attention, dict(q=zero, k=zero, v=one), (one,), dropout_p=p, seed=seed
    )
    wanted = dropout.attention_keep(seed, B, H, T, p, DEVICE).tril()
    assert torch.equal(out[..., :T] != 0, wanted)
    assert torch.equal(dv[..., :T].transpose(-2, -1) != 0, wanted)


def projection(B: int, T: int, H: int, D: int, dtype=torch.float32) -> Tensor:
    return randn(B, T, 3, H, D, seed=3).to(DEVICE, dtype)


@each_backward
@pytest.mark.parametrize(("T", "D"), [(1, 16), (17, 48), (33, 64)])
def test_packed(backward, T: int, D: int, dtype) -> None:
    qkv, dout = projection(2, T, 3, D, dtype), randn(2, T, 3, D, seed=5).to(DEVICE, dtype)
    options = dict(dropout_p=0.3, seed=2) if T == 17 else dict(scale=0.2)
    assert_op(attention, "causal_attention_packed", dict(qkv=qkv), (dout,), **options)
    if T > 1:  # one position has no gradient of q and k, and CUDA's kernels leave a rounding error
        assert_op(builtin, "causal_attention_packed", dict(qkv=qkv), (dout,))


def test_packed_copies_nothing_between_the_projections() -> None:
    """If q, k and v were unbound, autograd would stack their gradients."""
    qkv = projection(2, 37, 3, 16).requires_grad_()
    out = attention.causal_attention_packed(qkv)
    assert out.is_contiguous()
    (before, *_), *others = out.grad_fn.next_functions
    assert before.variable is qkv
    assert not any(node for node, _ in others)
    (dqkv,) = torch.autograd.grad(out.sum(), qkv)
    assert dqkv.is_contiguous()
