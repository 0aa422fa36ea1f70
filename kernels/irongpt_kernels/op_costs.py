"""The least bytes that the optimizer's ops move across DRAM."""

import math

from irongpt_kernels.op_inputs import Weights


def numel(sizes: Weights) -> int:
    """The number of elements of tensors with these sizes."""
    return sum(math.prod(size) for size in sizes)


def adamw_bytes(n: int, grad_itemsize: int, copy_itemsize: int) -> int:
    """Bytes of grad_norm and adamw for n weights, whose gradients are read twice."""
    return n * (24 + 2 * grad_itemsize + copy_itemsize)


def muon_bytes(n: int, grad_itemsize: int, update_itemsize: int, copy_itemsize: int) -> int:
    """Bytes of muon_momentum and muon_update; gradients and momentum are read twice."""
    return n * (2 * grad_itemsize + 12 + 2 * update_itemsize + 8 + copy_itemsize)


def optimizer_bytes(optimizer: str, matrices: int, others: int, itemsize: int) -> int:
    """Bytes of a step over `matrices` weights in the blocks' matrices, whose gradients and copies
    have `itemsize` bytes (without copies in float32), and `others` weights, which are float32."""
    copy = itemsize if itemsize < 4 else 0
    rest = adamw_bytes(others, 4, 0)
    if optimizer == "muon":  # grad_norm has read the gradients before
        return rest + muon_bytes(matrices, itemsize, itemsize, copy) + matrices * itemsize
    return rest + adamw_bytes(matrices, itemsize, copy)
