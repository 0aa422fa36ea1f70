"""The least that ops need, see `Cost`. Costs with a short formula are written in `op_specs` itself.

item, stream: bytes of an element of the compute dtype and of the residual stream.
"""

import math
from typing import NamedTuple

from irongpt_kernels.op_inputs import Shape, Sizes


class Cost(NamedTuple):
    """The least that an op needs: bytes read from and written to DRAM, and FLOPs, two for each
    multiply-add of its matmuls."""

    bytes: int
    flops: int = 0


def attention_cost(s: Shape, item: int, stream: int, backward: bool) -> Cost:
    """The forward moves q, k, v, out and the statistics. The backward moves all of these, and dout,
    dq, dk and dv. The forward has two matmuls (scores, output), the backward five (scores, dZ, dV,
    dQ, dK), each over the T (T + 1) / 2 pairs that the causal mask leaves."""
    rows, tensors, matmuls = s.B * s.H * s.T, 8 if backward else 4, 5 if backward else 2
    return Cost(rows * (tensors * s.D * item + 8), matmuls * rows * (s.T + 1) * s.D)


def norm_cost(s: Shape, item: int, stream: int, backward: bool) -> Cost:
    """The rows and the statistics of each row are moved. The parameters stay in L2."""
    return Cost(s.rows * ((3 if backward else 2) * s.width * stream + 8))


def add_norm_cost(s: Shape, item: int, stream: int, backward: bool) -> Cost:
    """The forward moves branch, norm, residual and sum; the backward the sum and all gradients."""
    return Cost(s.rows * (s.width * (2 * item + (3 if backward else 2) * stream) + 8))


def softmax_cost(s: Shape, item: int, stream: int, backward: bool) -> Cost:
    """Of a causal row only the visible positions are read, but all are written."""
    rows = s.B * s.H * s.T
    return Cost(((2 if backward else 1) * (rows * (s.T + 1) // 2) + rows * s.T) * item)


def embed_norm_cost(s: Shape, item: int, stream: int, backward: bool) -> Cost:
    """The sum and its norm are written. The backward reads their gradients and the sum, and writes
    the gradients of both embeddings. Each row has an id and statistics. The embeddings stay in
    L2."""
    rows = s.B * s.T * ((3 if backward else 2) * s.width * stream + 8 + 8)
    return Cost(rows + (s.V + s.T) * s.width * 4 * backward)


def numel(sizes: Sizes) -> int:
    """The number of elements of tensors with these sizes."""
    return sum(math.prod(size) for size in sizes)


def adamw_bytes(n: int, grad_itemsize: int, copy_itemsize: int) -> int:
    """Bytes of grad_norm and adamw for n weights, whose gradients are read twice."""
    return n * (24 + 2 * grad_itemsize + copy_itemsize)


def muon_bytes(n: int, grad_itemsize: int, update_itemsize: int, copy_itemsize: int) -> int:
    """Bytes of muon_momentum and muon_update; gradients and momentum are read twice."""
    return n * (2 * grad_itemsize + 12 + 2 * update_itemsize + 8 + copy_itemsize)


def optimizer_bytes(optimizer: str, matrices: int, others: int, itemsize: int) -> int:
    """Bytes of an optimizer step. matrices: the number of weights in the blocks' matrices, whose
    gradients and copies have `itemsize` bytes; in float32 there are no copies. others: the number
    of all other weights, whose gradients are float32 and which have no copies."""
    copy = itemsize if itemsize < 4 else 0
    other_bytes = adamw_bytes(others, 4, 0)
    if optimizer == "muon":  # the last term: grad_norm reads the matrices' gradients once more
        return other_bytes + muon_bytes(matrices, itemsize, itemsize, copy) + matrices * itemsize
    return other_bytes + adamw_bytes(matrices, itemsize, copy)


def gelu_cost(s: Shape, item: int, stream: int, backward: bool) -> Cost:
    """The forward moves x and y, the backward x, dy and dx."""
    return Cost((3 if backward else 2) * s.rows * 4 * s.width * item)


def cross_entropy_cost(s: Shape, item: int, stream: int, backward: bool) -> Cost:
    """The forward reads the logits; the backward also writes their gradient. Each row has a target
    and two statistics."""
    return Cost(s.rows * ((2 if backward else 1) * s.V * item + 8 + 8))


def linear_cross_entropy_cost(s: Shape, item: int, stream: int, backward: bool) -> Cost:
    """The forward reads x, weight and targets; the backward reads them and writes the gradients of
    x and weight. The logits are not counted: a kernel could keep them on chip and compute both
    gradients together with the loss."""
    elements = (s.rows + s.V) * s.width
    bytes_ = elements * item * (2 if backward else 1) + s.rows * 8
    return Cost(bytes_, (2 if backward else 1) * 2 * s.rows * s.V * s.width)
