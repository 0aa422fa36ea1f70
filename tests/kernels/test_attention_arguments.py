"""What causal attention refuses, and what it says it costs."""

import pytest
import torch
from irongpt_kernels.fused import attention

GOOD = torch.zeros(2, 3, 8, 16)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "q must be a tensor, got list", dict(q=[1.0])),
        (TypeError, "k must be float32, float16 or bfloat16, got torch.float64",
         dict(k=GOOD.double())),
        (TypeError, "v must be .* got torch.int64", dict(v=GOOD.long())),
        (ValueError, r"q must have 4 dimensions, got shape \(3, 8, 16\)", dict(q=GOOD[0])),
        (ValueError, r"k must have shape \(2, 3, 8, 16\), got \(2, 3, 7, 16\)",
         dict(k=GOOD[:, :, 1:])),
        (ValueError, r"v must have shape .* got \(2, 3, 8, 8\)", dict(v=GOOD[..., :8])),
        (ValueError, "v must have the dtype of q, torch.float32, got torch.float16",
         dict(v=GOOD.half())),
        (ValueError, "D, the last dimension of q, must be 16, 32, ... or 128, got 40",
         dict.fromkeys("qkv", torch.zeros(1, 1, 4, 40))),
        (ValueError, "got 144", dict.fromkeys("qkv", torch.zeros(1, 1, 4, 144))),
        (ValueError, "got 0", dict.fromkeys("qkv", torch.zeros(1, 1, 4, 0))),
        (ValueError, "scale must be finite, got inf", dict(scale=float("inf"))),
        (ValueError, r"dropout_p must be in \[0, 1\), got 1.0", dict(dropout_p=1.0, seed=1)),
        (ValueError, "dropout_p > 0 needs a seed", dict(dropout_p=0.1)),
        (TypeError, "seed must be an int or a 0-d int64 tensor", dict(seed=torch.zeros(1))),
        (ValueError, "k is on meta, but q is on cpu", dict(k=GOOD.to("meta"))),
        (ValueError, "seed is on meta, but q is on cpu",
         dict(dropout_p=0.1, seed=torch.tensor(1, device="meta"))),
    ],
)  # fmt: skip
def test_bad_arguments(error: type[Exception], message: str, changed: dict) -> None:
    with pytest.raises(error, match=message):
        attention.causal_attention(**dict(q=GOOD, k=GOOD, v=GOOD) | changed)
