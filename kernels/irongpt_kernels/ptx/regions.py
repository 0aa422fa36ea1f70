"""The global memory of a launch: which bytes a kernel may access, and which warps have done so."""

import numpy as np
from torch import Tensor

from irongpt_kernels.ptx.arithmetic import Array, i4, i8, u4

NO_CTA, SEVERAL = -1, -2


class Regions:
    """Legal memory: its contiguous pieces, divided into cells of `granule` bytes; every access
    covers complete cells.

    Bytes between the elements of a view are not legal, unless they belong to another view.
    """

    def __init__(self, tensors: list[Tensor], granule: int) -> None:
        self.granule = granule
        pieces = [_pieces(t) for t in tensors if t.numel()]
        self.spans = [(starts.min(), ends.max()) for starts, ends in pieces]  # of the views
        self.starts, self.sizes = _union(pieces or [(np.array([0]), np.array([0]))])
        cells = -(-self.sizes // granule)
        self.first_cell = np.cumsum(cells) - cells
        end = int(cells.sum())
        self.writer = np.full(end, NO_CTA, dtype=i4)  # a CTA
        self.reader = np.full(end, NO_CTA, dtype=i4)  # a CTA, or SEVERAL
        # The interval between barriers to which writing_warps and reading_warps belong.
        self.interval = np.full(end, -1, dtype=i8)
        self.writing_warps = np.zeros(end, dtype=u4)
        self.reading_warps = np.zeros(end, dtype=u4)

    def locate(self, address: Array, width: int) -> tuple[Array, Array]:
        """Whether each of n accesses lies within one piece of legal memory, and the indices of the
        cells that it covers, (n, cells)."""
        k = np.searchsorted(self.starts, address, side="right") - 1
        offset = address - self.starts[k]
        inside = (k >= 0) & (offset >= 0) & (offset + width <= self.sizes[k])
        first = self.first_cell[k] + offset // self.granule
        return inside, first[:, None] + np.arange(max(1, width // self.granule))

    def spanned(self, address: Array, width: int) -> Array:
        """Whether each access lies between the first and the last byte of a view."""
        inside = [(address >= start) & (address + width <= end) for start, end in self.spans]
        return np.any([np.zeros(len(address), dtype=bool), *inside], 0)


def _pieces(t: Tensor) -> tuple[Array, Array]:
    """The addresses of the contiguous pieces of a view, and one past their ends."""
    dims = sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1 and s > 0)
    run = 1
    while dims and dims[0][0] == run:
        run *= dims.pop(0)[1]
    starts = np.zeros(1, dtype=i8)
    for stride, n in dims:
        starts = (starts[:, None] + np.arange(n) * stride).ravel()
    starts = t.data_ptr() + starts * t.itemsize
    return starts, starts + run * t.itemsize


def _union(pieces: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The addresses and sizes of the pieces, in order. Those that overlap or touch become one."""
    starts, ends = (np.concatenate(x) for x in zip(*pieces, strict=True))
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    first = np.append(True, starts[1:] > ends[:-1])
    return starts[first], ends[np.append(first[1:], True)] - starts[first]
