"""Parameters, global memory and shared memory, checked at every access.

Global memory is the memory of the process, at absolute addresses. These errors are reported:

- an access that is out of bounds or misaligned
- a race: two CTAs, or two warps of a CTA without a barrier between, access one address, and one of
  them writes (but warps may store the same value to shared memory)
- a read of shared memory that was never written
- an access to bytes that an asynchronous copy still fills, or a store to bytes that a wgmma reads
- lanes of one instruction that store different values to one address
"""

import numpy as np

from irongpt_kernels.ptx.arithmetic import UINT, Array, i2, i8, u1, u2, u4
from irongpt_kernels.ptx.regions import NO_CTA, SEVERAL
from irongpt_kernels.ptx.threads import NO_NAN, Launch, Pending, Site, Threads

_BASE = 4096  # NumPy accepts no array at address 0
RACE = "race between warps"


class _Raw:
    """All of the process's memory, as words of `size` bytes."""

    def __init__(self, size: int) -> None:
        count = ((1 << 47) - _BASE) // size
        self.__array_interface__ = dict(
            shape=(count,), typestr=f"<u{size}", data=(_BASE, False), version=3
        )


MEMORY = {size: np.asarray(_Raw(size)) for size in UINT}


def _same(x: Array, y: Array, infinity: int) -> Array:
    """Whether words are equal, where any two NaN are equal too. A word is one float32, or one or
    two 16-bit floats. infinity: the bits of infinity in the 16-bit dtype; in that dtype larger bit
    patterns are NaN. On a GPU all NaN that arithmetic makes have the same bits; in NumPy those of a
    sum may depend on the order of the operands."""
    same, size = x == y, x.dtype.itemsize
    if same.all() or size not in (2, 4):
        return same
    bits = x.dtype.type(0x7FFF if size == 2 else 0x7FFF_FFFF)  # all but the sign
    limit = infinity if size == 2 else 0x7F80_0000
    same = same | ((x & bits) > limit) & ((y & bits) > limit)
    if size == 4:
        a, b = (np.ascontiguousarray(z).view(u2) for z in (x, y))
        same = same | _same(a, b, infinity).reshape(*x.shape, 2).all(-1)
    return same


class Memory(Threads):
    """Some CTAs with their memory. Shared memory is divided into granules, the smallest pieces that
    the kernel accesses. `wrote` and `read` have a bit mask for each: bit w is that of warp w."""

    def __init__(self, launch: Launch, ctas: list[tuple[int, int, int]]) -> None:
        super().__init__(launch, ctas)
        self.regions = launch.regions
        params = np.frombuffer(launch.params, dtype=u1)
        self.shared_size, self.granule = launch.shared_bytes, launch.shared_granule
        pitch = -(-self.shared_size // 128) * 128 + 128
        raw = np.full(pitch * self.n_cta, 0xA5, dtype=u1)
        self.shared = {size: raw.view(t) for size, t in UINT.items()}
        viewed = {size: params.view(t) for size, t in UINT.items()}
        self.words = {"param": viewed, "global": MEMORY, "shared": self.shared}
        self.shared_base = (self.cta * pitch).astype(i8)
        cells = pitch * self.n_cta // self.granule
        # Of each granule of shared memory: the warps that wrote and read it since the last barrier,
        # whether it was ever written, and the asynchronous copies and wgmma that still use it.
        self.wrote, self.read = np.zeros(cells, dtype=u4), np.zeros(cells, dtype=u4)
        self.known = np.zeros(cells, dtype=bool)
        self.copies, self.wgmma_reads = np.zeros(cells, dtype=i2), np.zeros(cells, dtype=i2)
        self.pending_copies = Pending(self.n // 32)  # by warp

    # Global memory ------------------------------------------------------------------------------

    def _global(
        self, address: Array, width: int, threads: Array, at: Site, store: bool
    ) -> tuple[Array, Array]:
        """Checks an access. Returns the threads that may go on, and their places in MEMORY."""
        inside, cells = self.regions.locate(address, width)
        if not inside.all():
            gap = ~inside & self.regions.spanned(address, width)
            self.report_error("out of bounds", gap, threads, at, "between the elements of a view")
            address, cells, threads, inside = (x[~gap] for x in (address, cells, threads, inside))
        good = self._good(inside, address, width, threads, at, "global memory")
        if not good.all():
            address, cells, threads = address[good], cells[good], threads[good]
        if len(threads):
            self._cta_races(cells, threads, at, store)
            self._warp_races(cells, threads, at, store)
        return threads, address - _BASE

    def _good(
        self, inside: Array, address: Array, width: int, threads: Array, at: Site, where: str
    ) -> Array:
        """Which addresses are inside and aligned; reports the others."""
        odd = inside & (address % width != 0)
        self.report_error("out of bounds", ~inside, threads, at, f"in {where}")
        self.report_error("misaligned", odd, threads, at, f"{width} bytes of {where}")
        return inside & ~odd

    def _cta_races(self, cells: Array, threads: Array, at: Site, store: bool) -> None:
        r = self.regions
        cta = np.broadcast_to(self.cta_number[threads][:, None], cells.shape)
        writer, reader = r.writer[cells], r.reader[cells]
        clash = (writer != NO_CTA) & (writer != cta)
        if store:
            clash |= (reader != NO_CTA) & (reader != cta)
            r.writer[cells] = cta
            clash |= r.writer[cells] != cta  # two CTAs in this very instruction
        else:
            new = np.where((reader == NO_CTA) | (reader == cta), cta, SEVERAL)
            r.reader[cells] = new
            r.reader[cells[r.reader[cells] != new]] = SEVERAL
        self.report_error("race between CTAs", clash.any(1), threads, at)

    def _warp_races(self, cells: Array, threads: Array, at: Site, store: bool) -> None:
        r = self.regions
        now = self.barriers[self.cta[threads]] * (1 << 32) + self.cta_number[threads]
        now = np.broadcast_to(now[:, None], cells.shape)
        old = cells[r.interval[cells] != now]
        r.writing_warps[old] = r.reading_warps[old] = 0
        r.interval[cells] = now
        bit = np.broadcast_to(self.warp_bit[threads][:, None], cells.shape)
        others = r.writing_warps[cells] & ~bit
        if store:
            others |= r.reading_warps[cells] & ~bit
        mine = r.writing_warps if store else r.reading_warps
        np.bitwise_or.at(mine, cells.ravel(), bit.ravel())
        if store:
            others |= r.writing_warps[cells] & ~bit
        self.report_error(RACE, others.any(1), threads, at, "in global memory")

    # Shared memory ------------------------------------------------------------------------------

    def cells(self, flat: Array, width: int) -> Array:
        return (flat // self.granule)[:, None] + np.arange(max(1, width // self.granule))

    def _shared(
        self,
        address: Array,
        width: int,
        threads: Array,
        at: Site,
        store: bool,
        data: Array | None = None,
        infinity: int = NO_NAN,
    ) -> tuple[Array, Array]:
        """Checks an access to addresses within a CTA's memory. Returns the threads that may go on,
        and their places in `self.shared`.

        data: the words of a store, (threads, words). Warps that hold the same value may all store
        it to the same address, which is not reported as a race. infinity: see `_same`.
        """
        inside = (address >= 0) & (address + width <= self.shared_size)
        good = self._good(inside, address, width, threads, at, "shared memory")
        if not good.all():
            threads, address = threads[good], address[good]
            data = None if data is None else data[good]
        flat = address + self.shared_base[threads]
        cells = self.cells(flat, width)
        bit = np.broadcast_to(self.warp_bit[threads][:, None], cells.shape)
        others = self.wrote[cells] & ~bit
        if store:
            if data is not None and others.any():
                there = self.shared[1][flat[:, None] + np.arange(width)].view(data.dtype)
                same = _same(there, data, infinity).repeat(data.itemsize // self.granule, 1)
                others = np.where(same, u4(0), others)
            others = others | (self.read[cells] & ~bit)
            np.bitwise_or.at(self.wrote, cells.ravel(), bit.ravel())
            if data is None:  # two warps in this very instruction
                others |= self.wrote[cells] & ~bit
            self.known[cells] = True
            used = self.wgmma_reads[cells].any(1)
            self.report_error("wgmma in flight", used, threads, at, "it still reads these bytes")
        else:
            np.bitwise_or.at(self.read, cells.ravel(), bit.ravel())
            unwritten = ~self.known[cells].all(1)
            self.report_error("read of unwritten shared memory", unwritten, threads, at)
        self.report_error(RACE, others.any(1), threads, at, "in shared memory")
        self.report_error("async copy in flight", self.copies[cells].any(1), threads, at)
        return threads, flat

    # Loads and stores ---------------------------------------------------------------------------

    def ld(self, space: str, address: Array, size: int, vec: int, at: Site) -> list[Array]:
        """Returns `vec` registers of `size` bytes, which are 0 in threads that do not load."""
        threads = self.active(at)
        out = np.zeros((vec, self.n), dtype=UINT[size])
        if len(threads):
            place = address[threads]
            if space != "param":
                check = self._global if space == "global" else self._shared
                threads, place = check(place, size * vec, threads, at, False)
            for v in range(vec):
                out[v, threads] = self.words[space][size][place // size + v]
        return list(out)

    def st(
        self, space: str, address: Array, values: list[Array], size: int, float32: bool, at: Site
    ) -> None:
        """float32: whether the values are known to be float32."""
        infinity = NO_NAN if float32 else self.launch.infinity
        threads, width = self.active(at), size * len(values)
        if not len(threads):
            return
        place = address[threads]
        if space == "global":
            threads, place = self._global(place, width, threads, at, True)
        else:
            stored = np.stack([x[threads].astype(UINT[size], copy=False) for x in values], 1)
            data = stored.view(u4) if size > 4 else stored
            threads, place = self._shared(place, width, threads, at, True, data, infinity)
        words = self.words[space][size]
        self._write(words, place // size, [x[threads] for x in values], threads, at, infinity)

    def _write(
        self,
        words: Array,
        index: Array,
        values: list[Array],
        threads: Array,
        at: Site,
        infinity: int,
    ) -> None:
        for v, x in enumerate(values):
            x = x.astype(words.dtype, copy=False)
            words[index + v] = x
            differ = ~_same(words[index + v], x, infinity)
            self.report_error("lanes store different values", differ, threads, at)

    def bar(self, at: Site) -> None:
        """A barrier. All threads of a CTA that have not exited must be at it."""
        there, live = (
            x.reshape(self.n_cta, -1) for x in (self.alive if at[1] is None else at[1], self.alive)
        )
        ctas = there.any(1)
        bad = np.repeat(ctas & (there != live).any(1), self.cta_threads)
        self.report_error("incomplete CTA", bad, self.thread, at, "at a barrier")
        self.barriers[ctas] += 1
        for warps in (self.wrote, self.read):
            warps.reshape(self.n_cta, -1)[ctas] = 0

    def _matrices(
        self, address: Array, count: int, threads: Array, at: Site, rows: Array | None = None
    ) -> Array | None:
        """Where the elements of `count` 8 x 8 matrices per warp are in shared memory, as indices of
        2-byte words: (warps, count, 8, 8). Lanes 8 i to 8 i + 7 have the addresses of the rows of
        matrix i.

        rows: (addresses, 8) words to store there; None for a load.
        """
        users = threads.reshape(-1, 32)[:, : 8 * count].ravel()
        infinity = self.launch.infinity
        good, flat = self._shared(address[users], 16, users, at, rows is not None, rows, infinity)
        if len(good) < len(users):
            return None  # it was reported
        if rows is not None:
            self._write(self.shared[2], flat // 2, list(rows.T), users, at, infinity)
        return (flat.reshape(-1, count, 8) // 2)[..., None] + np.arange(8)

    def ldmatrix(self, address: Array, count: int, transposed: bool, at: Site) -> list[Array]:
        """From row t // 4 of each matrix, lane t gets the elements 2 (t % 4) and 2 (t % 4) + 1."""
        threads = self.whole_warps(at)
        index = self._matrices(address, count, threads, at)
        if index is None:
            return [self.const(0, u4)] * count
        words = self.shared[2][index]
        words = np.ascontiguousarray(words.swapaxes(2, 3) if transposed else words).view(u4)
        return [self.spread(words[:, i].reshape(-1), threads) for i in range(count)]

    def stmatrix(self, address: Array, values: list[Array], transposed: bool, at: Site) -> None:
        threads = self.whole_warps(at)
        words = [np.ascontiguousarray(x[threads]).view(u2).reshape(-1, 8, 8) for x in values]
        matrices = np.stack(words, 1).swapaxes(2, 3 if transposed else 2)
        rows = np.ascontiguousarray(matrices).reshape(-1, 8)
        self._matrices(address, len(values), threads, at, rows)

    # Asynchronous copies ------------------------------------------------------------------------

    def cp_async(
        self, to: Array, source: Array, size: int, source_bytes: Array | None, at: Site
    ) -> None:
        """From global to shared memory. The bytes arrive when its commit group (see `Pending`) is
        waited for."""
        threads = self.active(at)
        if not len(threads):
            return
        data = np.zeros((len(threads), size), dtype=u1)
        reads = np.ones(len(threads), dtype=bool)
        if source_bytes is not None:  # 0 fills with zeros
            count = source_bytes[threads]
            if not np.isin(count, (0, size)).all():
                raise NotImplementedError("cp.async of a part of its bytes")
            reads = count > 0
        some = threads[reads]
        kept, place = self._global(source[some], size, some, at, False)
        data[np.searchsorted(threads, kept)] = MEMORY[1][place[:, None] + np.arange(size)]
        good, flat = self._shared(to[threads], size, threads, at, True)
        if len(good) < len(threads):
            return  # it was reported
        np.add.at(self.copies, self.cells(flat, size).ravel(), 1)
        for warp in np.unique(threads // 32):
            mine = threads // 32 == warp
            self.pending_copies.open[warp].append((threads[mine], flat[mine], data[mine]))

    def cp_commit(self, m: Array | None) -> None:
        self.pending_copies.commit(self.warps(m))

    def cp_wait(self, left: int, m: Array | None) -> None:
        """Waits until at most `left` groups are in flight."""
        for threads, flat, data in self.pending_copies.wait(self.warps(m), left):
            size = data.shape[1]
            cells = self.cells(flat, size)
            np.subtract.at(self.copies, cells.ravel(), 1)
            self.shared[1][flat[:, None] + np.arange(size)] = data
            # The bytes are visible to the warp that waited. Other warps need a barrier first.
            bit = np.broadcast_to(self.warp_bit[threads][:, None], cells.shape)
            np.bitwise_or.at(self.wrote, cells.ravel(), bit.ravel())

    def finish(self) -> None:
        """Called when the CTAs have ended. Reports asynchronous copies that are still in flight."""
        pending = self.pending_copies
        if any(pending.open) or any(any(groups) for groups in pending.groups):
            self.report.add("async copy in flight", 1, f"{self.launch.name} ends with it")
