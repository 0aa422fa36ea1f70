"""Causal attention by Triton kernels, held to `eager` by the rule of `numerics`."""

import pytest
import torch
from irongpt_kernels import eager
from irongpt_kernels.fused import attention, attention_tiles
from irongpt_kernels.runtime import launch
from numerics import DEVICE, LAYOUTS, assert_op, each_dtype, randn, run
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

        monkeypatch.setattr(attention_tiles, "tiles", tiles)

    return set_tiles


def inputs(B: int, H: int, T: int, D: int, dtype=torch.float32, factor: float = 1) -> dict:
    q, k, v = ((factor * randn(B, H, T, D, seed=i)).to(DEVICE, dtype) for i in range(3))
    return dict(q=q, k=k, v=v)


def check(x: dict[str, Tensor], dout: Tensor | None = None, **options) -> None:
    if dout is None:
        dout = randn(*x["q"].shape, seed=90).to(x["q"])
    assert_op(attention, "causal_attention", x, (dout,), **options)


@each_dtype
@pytest.mark.parametrize("T", [1, 2, 16, 17, 31, 32, 33, 64, 65, 97])
@pytest.mark.parametrize("tiles", TILINGS)
def test_every_end_of_a_sequence_in_a_tile(tiling, tiles: str, T: int, dtype) -> None:
    tiling(tiles)
    options = dict(dropout_p=0.3, seed=5) if dtype == torch.float32 else {}
    check(inputs(1, 2, T, 16, dtype), **options)


@pytest.mark.parametrize(
    ("T", "dtype"),
    [(255, torch.float16), (256, torch.float16), (256, torch.float32), (1000, torch.float32)],
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
def test_the_models_heads_at_every_length(T: int, dtype) -> None:
    check(inputs(2, 3, T, 64, dtype), dropout_p=0.2, seed=1)


@each_dtype
@pytest.mark.parametrize("D", [48, 64, 80, 96, 112, 128])
def test_head_dimensions(D: int, dtype) -> None:
    check(inputs(1, 2, 37, D, dtype))


@each_dtype
@pytest.mark.parametrize("scale", [0.3, 1.0, 0.0, -0.5])
def test_scale(scale: float, dtype) -> None:
    check(inputs(1, 2, 40, 16, dtype), scale=scale)


@each_dtype
def test_many_heads_and_sequences_do_not_mix(dtype) -> None:
    check(inputs(3, 5, 33, 16, dtype), dropout_p=0.2, seed=2**40 + 3)


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_inputs_and_gradients_changes_no_bit(layout: str, dtype) -> None:
    place, x = LAYOUTS[layout], inputs(2, 2, 37, 16, dtype)
    laid = {n: place(t) for n, t in x.items()}
    upstream = place(randn(2, 2, 37, 16, seed=7).to(laid["q"]))
    results = run_op(laid, upstream)
    contiguous = run_op({n: t.contiguous() for n, t in laid.items()}, upstream.contiguous())
    assert all(map(torch.equal, results, contiguous))
    assert not any(t.isnan().any() for t in results)


@each_dtype
def test_a_packed_projection_in_and_one_packed_gradient_out(dtype) -> None:
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
@pytest.mark.parametrize("kind", ["large logits", "equal", "one winner", "large values", "small"])
def test_extreme_values(kind: str, dtype) -> None:
    x = inputs(1, 2, 40, 16, dtype)
    if kind == "large logits":
        x = dict(q=x["q"] * 15, k=x["k"] * 15, v=x["v"])
    elif kind == "equal":
        x = {n: torch.full_like(t, 1.5) for n, t in x.items()}
    elif kind == "one winner":  # scores to the edge of float16, one column far above the others
        factor = 40
        x["k"][:, :, 20] = x["q"][:, :, 30] * factor
        x["q"] *= factor
    elif kind == "large values":
        x["v"] *= 1e3
    else:
        x = {n: t * 1e-3 for n, t in x.items()}
    check(x)


def test_float32_scores_of_any_size() -> None:
    """Scores of 1e30: every row takes one column, and no exponent overflows."""
    x = inputs(1, 2, 40, 16)
    x["q"], x["k"] = x["q"] * 1e15, x["k"] * 1e15
    check(x)


@each_dtype
@pytest.mark.parametrize("factor", [1e3, 1e-3], ids=str)
def test_large_and_small_upstream_gradients(factor: float, dtype) -> None:
    """A loss scale of 65536 makes them large: neither dP nor dS may leave float16's range."""
    dout = (factor * randn(1, 2, 40, 64, seed=9)).to(DEVICE, dtype)
    check(inputs(1, 2, 40, 64, dtype), dout)
    check(inputs(1, 2, 40, 64, dtype), dout, dropout_p=0.2, seed=3)


@each_dtype
def test_a_sequence_beyond_the_row_reaches_nothing(dtype) -> None:
    """What later positions hold, NaN included, changes no earlier row of the output."""
    x, T = inputs(1, 2, 70, 16, dtype), 64
    short = attention.causal_attention(**{n: t[:, :, :T] for n, t in x.items()})
    for t in x.values():
        t[:, :, T:] = float("nan")
    assert torch.equal(attention.causal_attention(**x)[:, :, :T], short)


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 0, 5, 16), (2, 2, 0, 16)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    x = inputs(*shape)
    out, *gradients = run_op(x, torch.ones(shape, device=DEVICE))
    assert out.shape == shape
    assert [g.shape for g in gradients] == [shape] * 3


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv"])
def test_any_input_may_be_frozen(wanted: str) -> None:
    x = inputs(1, 2, 33, 16)
    dout = randn(1, 2, 33, 16, seed=3).to(x["q"])
    everything = dict(zip("qkv", run_op(x, dout)[1:], strict=True))
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in x.items()}
    attention.causal_attention(**leaves).backward(dout)
    for n, t in leaves.items():
        assert torch.equal(t.grad, everything[n]) if n in wanted else t.grad is None


def test_without_gradients() -> None:
    x = inputs(1, 2, 33, 16)
    out = attention.causal_attention(**x, dropout_p=0.2, seed=1)
    assert not out.requires_grad
    leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
    with torch.inference_mode():
        assert torch.equal(attention.causal_attention(**leaves, dropout_p=0.2, seed=1), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_gives_the_dtypes_of_eager(dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    grads = {}
    for module in (eager, attention):
        x = {n: t.requires_grad_() for n, t in inputs(1, 2, 33, 16).items()}
        with torch.autocast(DEVICE, dtype):
            out = module.causal_attention(**x)
        out.float().square().sum().backward()
        grads[module] = [out.dtype, *(t.grad.dtype for t in x.values())]
    assert grads[eager] == grads[attention] == [dtype, *[torch.float32] * 3]


def test_registration() -> None:
    x = [t.requires_grad_() for t in inputs(1, 2, 20, 16).values()]
    seed = launch.seed_tensor(3, x[0].device)
    torch.library.opcheck(torch.ops.irongpt.causal_attention.default, (*x, seed, 0.2, 0.25))
    x = [t.detach() for t in x]
    out, stats = torch.ops.irongpt.causal_attention(*x, seed, 0.2, 0.25)
    torch.library.opcheck(
        torch.ops.irongpt.causal_attention_backward.default,
        (out, *x, seed, out, stats, 0.2, 0.25, True),
    )
