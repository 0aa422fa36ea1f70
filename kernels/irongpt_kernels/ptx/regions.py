"""The global memory of a launch: which bytes a kernel may access, and which warps have done so."""

import numpy as np
import torch
from torch import Tensor

from irongpt_kernels.ptx.arithmetic import i4, i8, u4

LARGE = 1 << 26  # bytes; of a larger storage, pieces are listed instead of mapped byte by byte
NO_CTA, SEVERAL = -1, -2

Span = tuple[int, np.ndarray]  # an address, and which bytes from there on are legal


class Regions:
    """Legal memory, divided into cells of `granule` bytes; every access covers whole cells.

    Bytes between the elements of a view are not legal, unless they belong to another view.
    """

    def __init__(self, tensors: list[Tensor], granule: int) -> None:
        self.granule = granule
        spans = _spans(tensors)
        self.starts = np.array([start for start, _ in spans], dtype=i8)
        self.sizes = np.array([len(legal) for _, legal in spans], dtype=i8)
        cells = -(-self.sizes // granule) + 16
        self.first_cell = np.concatenate([[0], np.cumsum(cells)[:-1]]).astype(i8)
        end = int(cells.sum())
        self.legal = np.zeros(end, dtype=bool)
        for at, (_, legal) in zip(self.first_cell, spans, strict=True):
            padded = np.pad(legal, (0, -len(legal) % granule)).reshape(-1, granule)
            self.legal[at : at + len(padded)] = padded.any(1)
        self.writer = np.full(end, NO_CTA, dtype=i4)  # a CTA
        self.reader = np.full(end, NO_CTA, dtype=i4)  # a CTA, or SEVERAL
        # The interval between barriers to which writing_warps and reading_warps belong.
        self.interval = np.full(end, -1, dtype=i8)
        self.writing_warps = np.zeros(end, dtype=u4)
        self.reading_warps = np.zeros(end, dtype=u4)

    def locate(self, address: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Whether each of n accesses lies within one piece of legal memory, and the indices of the
        cells that it covers, (n, cells)."""
        k = np.searchsorted(self.starts, address, side="right") - 1
        offset = address - self.starts[k]
        inside = (k >= 0) & (offset >= 0) & (offset + width <= self.sizes[k])
        first = self.first_cell[k] + offset // self.granule
        return inside, first[:, None] + np.arange(max(1, width // self.granule))


def _spans(tensors: list[Tensor]) -> list[Span]:
    """The storages by address; of a large one, the pieces that the views cover."""
    found: dict[int, np.ndarray] = {}
    pieces: list[tuple[int, int]] = []
    for t in tensors:
        storage = t.untyped_storage()
        size = storage.nbytes()
        if size > LARGE:
            pieces += _pieces(t)
        elif size:
            legal = found.setdefault(storage.data_ptr(), np.zeros(size, dtype=bool))
            cells = torch.zeros(size // t.itemsize, dtype=torch.bool)
            cells.as_strided(t.size(), t.stride(), t.storage_offset()).fill_(True)
            some = np.repeat(cells.numpy(), t.itemsize)
            legal[: len(some)] |= some
    found |= {start: np.ones(size, dtype=bool) for start, size in _union(pieces)}
    return sorted(found.items()) or [(4096, np.zeros(0, dtype=bool))]


def _union(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pieces that overlap, such as those of two views, become one."""
    found: list[tuple[int, int]] = []
    for start, size in sorted(pieces):
        first, length = found[-1] if found else (start, 0)
        if start < first + length:
            found[-1] = first, max(length, start + size - first)
        else:
            found.append((start, size))
    return found


def _pieces(t: Tensor) -> list[tuple[int, int]]:
    """The addresses and bytes of the contiguous pieces of a view."""
    dims = sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1 and s > 0)
    run = 1
    while dims and dims[0][0] == run:
        run *= dims.pop(0)[1]
    starts = np.zeros(1, dtype=i8)
    for stride, n in dims:
        starts = (starts[:, None] + np.arange(n) * stride).ravel()
    return [(t.data_ptr() + int(s) * t.itemsize, run * t.itemsize) for s in starts]
