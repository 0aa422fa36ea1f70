"""Causal attention by Triton kernels, within the tolerance of eager. Also the packed op."""

import pytest
import torch
from extremes import each_extreme, extreme_attention
from irongpt_kernels import builtin, dropout
from irongpt_kernels.fused import attention, attention_tiles
from irongpt_kernels.runtime import launch
from numerics import DEVICE, assert_op, each_dtype, randn, run
from torch import Tensor

# Queries and keys of a tile: forward, dQ, dK and dV.
TILINGS = {
    "one tiling": [(32, 32), (32, 32), (32, 32)],
    "three tilings": [(32, 16), (16, 32), (64, 16)],
    "three more": [(16, 64), (64, 32), (16, 32)],
}
LARGE = {"large, for the interpreter": [(128, 256), (256, 128), (128, 256)]}


@pytest.fixture
def tiling(monkeypatch: pytest.MonkeyPatch):
    """Sets the tiles of the three kernels."""

    def set_tiles(name: str) -> None:
        sizes = dict(zip(["forward", "query", "key"], (TILINGS | LARGE)[name], strict=True))

        def tiles(kernel: str, *_: object) -> dict[str, int]:
            M, N = sizes[kernel]
            return dict(BLOCK_M=M, BLOCK_N=N, num_warps=4, num_stages=1)

        monkeypatch.setattr(attention_tiles, "launch_options", tiles)

    return set_tiles


def inputs(B: int, H: int, T: int, D: int, dtype=torch.float32, factor: float = 1) -> dict:
    q, k, v = ((factor * randn(B, H, T, D, seed=i)).to(DEVICE, dtype) for i in range(3))
    return dict(q=q, k=k, v=v)


def check(x: dict[str, Tensor], dout: Tensor | None = None, **options) -> None:
    if dout is None:
        dout = randn(*x["q"].shape, seed=90).to(x["q"])
    assert_op(attention, "causal_attention", x, (dout,), **options)


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


@each_dtype
@pytest.mark.parametrize("D", [48, 64, 80, 96, 112, 128])
def test_head_dimensions(D: int, dtype) -> None:
    check(inputs(1, 1, 37, D, dtype))


@each_dtype
@pytest.mark.parametrize("scale", [0.3, 1.0, 0.0, -0.5])
def test_scale(scale: float, dtype) -> None:
    check(inputs(1, 1, 17, 16, dtype), scale=scale)


@each_dtype
def test_a_packed_projection_in_and_one_packed_gradient_out(dtype) -> None:
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


@each_dtype
@each_extreme
def test_extreme_values(kind: str, dtype) -> None:
    check(extreme_attention(kind, inputs(1, 2, 40, 16, dtype)))


def test_float32_scores_of_any_size() -> None:
    """Scores of 1e30: every row takes one column, and no exponent overflows."""
    x = inputs(1, 1, 40, 16)
    x["q"], x["k"] = x["q"] * 1e15, x["k"] * 1e15
    check(x)


@each_dtype
def test_the_only_score_of_the_first_row_has_no_gradient(dtype) -> None:
    """Its weight is 1, whatever the score, although delta and dP are rounded differently."""
    dout = 50 * randn(2, 3, 40, 64, seed=9).to(DEVICE, dtype)
    dout[:, :, 1:] = 0
    _, dq, dk, _ = run_op(inputs(2, 3, 40, 64, dtype), dout)
    assert not dq.any()
    assert not dk.any()


@each_dtype
@pytest.mark.parametrize("factor", [1e3, 1e-3], ids=str)
def test_large_and_small_upstream_gradients(factor: float, dtype) -> None:
    """A loss scale of 65536 makes them large: neither dP nor dS may leave float16's range."""
    dout = (factor * randn(1, 1, 40, 64, seed=9)).to(DEVICE, dtype)
    check(inputs(1, 1, 40, 64, dtype), dout)
    check(inputs(1, 1, 40, 64, dtype), dout, dropout_p=0.2, seed=3)


@each_dtype
def test_later_positions_have_no_effect(dtype) -> None:
    """What later positions hold, NaN included, changes no earlier row of the output."""
    x, T = inputs(1, 2, 70, 16, dtype), 64
    before = attention.causal_attention(**x)
    for t in x.values():
        t[:, :, T:] = float("nan")
    assert torch.equal(attention.causal_attention(**x)[:, :, :T], before[:, :, :T])


GOOD = torch.zeros(2, 3, 8, 16)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("v must have the dtype of q, torch.float32, got torch.float16", dict(v=GOOD.half())),
        ("D, the last dimension of q, must be 16, 32, ... or 128, got 40",
         dict.fromkeys("qkv", torch.zeros(1, 1, 4, 40))),
        ("got 144", dict.fromkeys("qkv", torch.zeros(1, 1, 4, 144))),
        ("got 0", dict.fromkeys("qkv", torch.zeros(1, 1, 4, 0))),
        ("scale must be finite, got inf", dict(scale=float("inf"))),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(message: str, changed: dict) -> None:
    with pytest.raises(ValueError, match=message):
        attention.causal_attention(**dict(q=GOOD, k=GOOD, v=GOOD) | changed)


def kept(B: int, H: int, T: int, p: float, seed: int | Tensor, D: int = 48) -> Tensor:
    """The mask as the kernels use it: (2, B, H, T, T) bool, in the forward and in dV.

    Equal scores make a row's weights equal, and v the identity shows them; so does dout for dV.
    T is at most D.
    """
    zero = torch.zeros(B, H, T, D, device=DEVICE)
    one = torch.eye(T, D, device=DEVICE).expand(B, H, T, D)
    (out,), (_, _, dv) = run(
        attention.causal_attention, dict(q=zero, k=zero, v=one), (one,), dropout_p=p, seed=seed
    )
    return torch.stack([out[..., :T] != 0, dv[..., :T].transpose(-2, -1) != 0])


@pytest.mark.parametrize(("p", "seed"), [(0.001, 0), (0.2, 2**33 + 7), (0.2, -5)])
def test_dropout_has_the_bits_of_eager(p: float, seed: int) -> None:
    B, H, T = 2, 2, 40
    wanted = dropout.attention_keep(seed, B, H, T, p, DEVICE).tril()
    forward, backward = kept(B, H, T, p, seed)
    assert torch.equal(forward, wanted)
    assert torch.equal(backward, wanted)


def projection(B: int, T: int, H: int, D: int, dtype=torch.float32) -> Tensor:
    return randn(B, T, 3, H, D, seed=3).to(DEVICE, dtype)


@each_dtype
@pytest.mark.parametrize(("T", "D"), [(1, 16), (17, 48), (33, 64)])
def test_packed(T: int, D: int, dtype) -> None:
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


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"qkv must have shape \(B, T, 3, H, D\), got \(2, 8, 2, 4, 16\)",
         dict(qkv=torch.zeros(2, 8, 2, 4, 16))),
        ("D, the last dimension of qkv, .* got 40", dict(qkv=torch.zeros(2, 8, 3, 4, 40))),
        ("scale must be finite, got nan", dict(scale=float("nan"))),
    ],
)  # fmt: skip
def test_bad_arguments_of_packed_are_named(message: str, changed: dict) -> None:
    with pytest.raises(ValueError, match=message):
        attention.causal_attention_packed(**dict(qkv=torch.zeros(2, 8, 3, 4, 16)) | changed)
