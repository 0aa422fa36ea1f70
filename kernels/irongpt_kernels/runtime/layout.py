"""Views that launchers take of their tensors."""

from torch import Tensor


def matrix(x: Tensor) -> Tensor:
    """x as (M, N): a view where one stride leads from row to row, else a copy."""
    N = x.shape[-1]
    return x.reshape(x.numel() // N if N else 0, N)


def unpack(qkv: Tensor) -> tuple[Tensor, ...]:
    """(B, T, 3, H, D) -> q, k and v, or their gradients, as (B, H, T, D) views."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()
