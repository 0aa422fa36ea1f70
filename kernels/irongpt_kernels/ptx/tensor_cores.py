"""mma.sync and wgmma: which element of a matrix each register of each thread holds.

The fragments are those of the PTX ISA, "Matrix Fragments for mma.m16n8k16", "... mma.m16n8k8" and
"Register Fragments and Shared Memory Matrix Layouts" of wgmma. Results of a wgmma are visible at
once. So a read of the result before the wait is not caught. A store to the operands before the wait
is caught.
"""

from typing import Any

import numpy as np

from irongpt_kernels.ptx.arithmetic import Array, bf16_to_f8, f4, half_to_f8, i8, u2, u8
from irongpt_kernels.ptx.memory import RACE, Memory
from irongpt_kernels.ptx.threads import Launch, Pending, Site

_WIDEN = {"f16": half_to_f8, "bf16": bf16_to_f8}


class Batch(Memory):
    """The state of a batch of CTAs: threads, memory and tensor cores."""

    def __init__(self, launch: Launch, ctas: list[tuple[int, int, int]]) -> None:
        super().__init__(launch, ctas)
        self.pending_wgmmas = Pending(self.n // 128 + 1)  # by four warps

    def mma(
        self, dtype: str, a: list[Array], b: list[Array], c: list[Array], at: Site
    ) -> list[Array]:
        """m16n8k8 or m16n8k16. A register of a or b holds two 16-bit values, a register of c one
        float32."""
        threads = self.whole_warps(at)
        pairs = [self._pairs(x, threads, dtype) for x in b]
        B = np.concatenate(pairs, 2)  # (warps, 8, k), by columns of B
        return self._accumulate(c, self._rows(a, threads, dtype), B, threads)

    def _accumulate(
        self, c: list[Array], A: Array, B: Array, threads: Array, keep: Array | None = None
    ) -> list[Array]:
        """c + A B^T, without c where keep is false. A group is the warps of one instruction: one
        for mma, four for wgmma. A: (groups, m, k), B: (groups, n, k)."""
        groups, rows, n = len(A), A.shape[1] // 16, B.shape[1]
        C = np.empty((groups, rows, 16, n), dtype=f4)
        places = [
            (slice(8 * h, 8 * h + 8), slice(8 * j + e, 8 * j + 8, 2))
            for j in range(n // 8)
            for h in (0, 1)
            for e in (0, 1)
        ]
        for x, (row, column) in zip(c, places, strict=True):
            C[:, :, row, column] = x[threads].reshape(groups, rows, 8, 4)
        if keep is not None:
            C = np.where(keep[:, None, None, None], C, f4(0))
        D = self.launch.accumulate(C.reshape(groups, 16 * rows, n), A, B).reshape(C.shape)
        return [self.spread(D[:, :, row, column].reshape(-1), threads) for row, column in places]

    def _rows(self, a: list[Array], threads: Array, dtype: str) -> Array:
        """(warps, 16, k). Lane 4 g + t holds parts of row g in even registers, and of row g + 8 in
        odd ones."""
        pairs = [self._pairs(x, threads, dtype) for x in a]
        return np.concatenate([np.concatenate(pairs[i::2], 2) for i in (0, 1)], 1)

    def _pairs(self, x: Array, threads: Array, dtype: str) -> Array:
        """(warps, 8, 8) float64: lane 4 g + t holds columns 2 t and 2 t + 1 of row g."""
        words = np.ascontiguousarray(x if len(threads) == self.n else x[threads])
        return _WIDEN[dtype](words.view(u2)).reshape(-1, 8, 8)

    # wgmma ----------------------------------------------------------------------------------------

    def wgmma(
        self,
        n: int,
        dtype: str,
        c: list[Array],
        a: Any,
        b: Array,
        keep: Array,
        transposed: tuple[int, int],
        at: Site,
    ) -> list[Array]:
        """m64n{n}k16. a: a descriptor or four registers, b: a descriptor. keep: whether c is
        added. transposed: for a and for b, whether the contiguous values in shared memory lie along
        m or n, not along k."""
        threads = self.whole_warps(at)
        groups = len(threads) // 128
        if isinstance(a, list):
            A = self._rows(a, threads, dtype).reshape(groups, 64, 16)
        else:
            A = _WIDEN[dtype](self._tiles(a, 64, not transposed[0], threads, at))
        B = _WIDEN[dtype](self._tiles(b, n, not transposed[1], threads, at))
        kept = np.broadcast_to(keep, (self.n,))[threads].reshape(groups, 128)[:, 0]
        return self._accumulate(c, A, B, threads, kept)

    def _tiles(self, d: Array, rows: int, k_major: bool, threads: Array, at: Site) -> Array:
        """(groups, rows, 16) 16-bit values that a descriptor names for each group of four warps.

        The descriptor contains two distances in bytes, `lead` and `stride`.
        k_major: each row has 16 to 128 contiguous bytes along k. If these are only 16 bytes, they
            are k = 0 to 7, and `lead` is the distance to k = 8 to 15. `stride` is the distance from
            each group of 8 rows to the next group.
        not k_major: for one k, a group of 64, 32, 16 or 8 values along m or n is contiguous. The
            groups of 8 consecutive k lie directly one after the other. `stride` is the distance to
            the next 8 values of k, and `lead` that to the next group along m or n.
        """
        tiles = np.zeros((len(threads) // 128, rows, 16), dtype=u2)
        row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
        for tile, group in zip(tiles, threads.reshape(-1, 128), strict=True):
            words = d[group].astype(u8)
            differ = words != words[0]
            self.report_error("descriptor differs in a warp group", differ, group, at)
            start, lead, stride = (((int(words[0]) >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
            width = {1: 128, 2: 64, 3: 32, 0: 16}[int(words[0]) >> 62]
            if k_major:
                byte = start + row // 8 * stride + row % 8 * width
                byte = byte + (k // 8 * lead + k % 8 * 2 if width == 16 else k * 2)
            else:
                per = width // 2
                byte = start + k // 8 * stride + k % 8 * width + row // per * lead + row % per * 2
            byte = byte.astype(i8)
            if width > 16:  # swizzle: the row permutes the 16-byte pieces of a pattern
                byte ^= ((byte >> 7) & (width // 16 - 1)) << 4
            flat = self._operand(byte.ravel(), group, at)
            if flat is not None:
                tile[:] = self.shared[2][flat // 2].reshape(rows, 16)
        return tiles

    def _operand(self, address: Array, group: Array, at: Site) -> Array | None:
        """Checks that a wgmma may read these 16-bit values, and marks them as read until it is
        waited for. Returns their addresses in `self.shared`."""
        user = np.full(len(address), group[0])
        outside = (address < 0) | (address + 2 > self.shared_size)
        self.report_error("out of bounds", outside, user, at, "in shared memory")
        if outside.any():
            return None
        flat = address + self.shared_base[group[0]]
        cells = flat // self.granule
        # It reads for four warps at once, so a barrier must follow the stores of any of them.
        self.report_error(RACE, self.wrote[cells] != 0, user, at, "wgmma reads shared memory")
        self.report_error("async copy in flight", self.copies[cells] > 0, user, at)
        self.report_error("read of unwritten shared memory", ~self.known[cells], user, at)
        np.bitwise_or.at(self.read, cells, np.bitwise_or.reduce(self.warp_bit[group]))
        np.add.at(self.wgmma_reads, cells, 1)
        self.pending_wgmmas.open[group[0] // 128].append(cells)
        return flat

    def wgmma_commit(self, m: Array | None) -> None:
        self.pending_wgmmas.commit(np.unique(self.warps(m) // 4))

    def wgmma_wait(self, left: int, m: Array | None) -> None:
        for cells in self.pending_wgmmas.wait(np.unique(self.warps(m) // 4), left):
            np.subtract.at(self.wgmma_reads, cells, 1)
