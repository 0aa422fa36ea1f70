"""The ops of one token run clean under the sanitizer, which `test_sanitizer` tries."""

from typing import Any

import pytest
import torch
from addresses import addresses_only
from irongpt_kernels.runtime import launch
from numerics import DECODING, randn
from sanitizer import sanitize
from torch import Tensor

if not launch.INTERPRETED:
    pytest.skip("the sanitizer works on Triton's interpreter", allow_module_level=True)

from irongpt_kernels import fused
from test_sanitizer import F16, F32, _far_apart, of_no_values

TOKENS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in DECODING},
    "norm_linear with GELU": ("norm_linear", dict(gelu=True)),
    "sample_tokens of a few": ("sample_tokens", dict(top_k=5, top_p=0.7)),
}
each_token = pytest.mark.parametrize("case", TOKENS)


@each_token
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
def test_an_op_of_a_token_runs_clean_in_any_order(
    case: str, dtype: torch.dtype, order: int
) -> None:
    name, options = TOKENS[case]
    plain, checked = _token_inputs(name, dtype), _token_inputs(name, dtype)
    wanted = getattr(fused, name)(**plain, **options)
    with sanitize(order) as report:
        result = getattr(fused, name)(**checked, **options)
    assert len(report.kernels) == 1
    assert wanted is None or (wanted.isfinite().all() and torch.equal(result, wanted))
    for n, x in plain.items():
        assert torch.equal(x, checked[n])


def _token_inputs(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    counts = torch.tensor([[3, 0], [9, 33], [0, 20]])
    tokens = torch.tensor([[3, 4, 10, 7], [-1, 1, 2, 0], [5, 6, 0, 8]])
    x, weight, norm = randn(3, 37, dtype=F32), randn(21, 37, dtype=dtype), randn(37, dtype=F32)
    cache = randn(2, 3, 2, 34, 64, dtype=dtype)[..., 5:53]  # what lies beside is not to be read
    columns = randn(3, 2 * 21, dtype=dtype)[:, ::2]
    bias, residual = randn(21, dtype=F32), randn(3, 30, dtype=F32)[:, 4:25]
    return {
        "decode_attention": dict(
            qkv=randn(3, 1, 3, 2, 48, dtype=dtype, seed=1), cache_k=cache[0],
            cache_v=cache[1], position=counts[:, 1],
        ),
        "norm_linear": dict(x=x, weight=weight, norm_weight=norm, norm_bias=norm, bias=bias),
        "linear_add": dict(x=x.to(dtype), weight=weight, residual=residual, bias=bias),
        "embed_tokens": dict(
            tokens=tokens, counts=counts, wte=randn(11, 37, dtype=dtype),
            wpe=randn(34, 37, dtype=dtype),
        ),
        "sample_tokens": dict(
            logits=columns, tokens=tokens, counts=counts, seed=torch.tensor(3)
        ),
    }[name]  # fmt: skip


@of_no_values
@each_token
def test_an_op_of_a_token_addresses_strides_beyond_2_to_the_31(case: str) -> None:
    name, options = TOKENS[case]
    inputs = {n: x.to("meta") for n, x in _token_inputs(name, F16).items()}
    own = ("tokens", "counts", "bias", "norm_weight", "norm_bias")  # rows are theirs; copied
    inputs = {n: x if n in own or not x.dim() else _far_apart(x, 1) for n, x in inputs.items()}
    with addresses_only() as report:
        getattr(fused, name)(**inputs, **options)
    assert len(report.kernels) == 1


@of_no_values
@each_token
def test_an_op_of_a_token_addresses_rows_that_an_int32_cannot_count(case: str) -> None:
    """Strides of 2^30 fit into 32 bits, and their multiples do not."""
    name, options = TOKENS[case]

    def spread(x: Tensor) -> Tensor:
        inner = x[0].contiguous().stride()
        size = 2**30 * (len(x) - 1) + x[0].numel()
        return torch.empty(size, dtype=x.dtype, device="meta").as_strided(x.shape, (2**30, *inner))

    inputs = _token_inputs(name, F16)
    laid = {n: spread(x) if x.dim() > 1 else x.to("meta") for n, x in inputs.items()}
    with addresses_only() as report:
        getattr(fused, name)(**laid, **options)
    assert len(report.kernels) == 1
