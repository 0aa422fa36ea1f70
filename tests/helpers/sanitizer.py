"""
A sanitizer for Triton kernels in Triton's interpreter, for bugs that a GPU does not report.

    with sanitize():
        fused.layer_norm(x, weight)

runs every launch inside on copies of its tensors with guard bands between them, and raises
`Violation` on

- a load or store that is not on an element of one of the launch's tensors: a view of a wider tensor
  counts as the view only, and what lies between its elements is out of bounds,
- int32 arithmetic that overflows, which strides near 2^30 provoke without a large tensor,
- two programs of a launch that write one address, one that reads what another writes, and one store
  with two lanes on an address,
- an atomic operation: the kernels are to be deterministic.

`order` shuffles the programs of each launch by that seed; two orders must give the same bits.

`poison` makes reads of memory visible that was never written.

    with addresses_only():
        fused.layer_norm(x, weight)                 x on the meta device

checks bounds and overflow for tensors too large for any memory: loads give 0, stores do nothing,
and of each launch the first and the last program run.
"""

import contextlib
import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest.mock import patch

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.errors import InterpreterError
from triton.runtime.jit import MockTensor

GUARD = 1 << 16  # bytes around every storage: more than the tiles of a test reach over
NONE, SEVERAL = -1, -2


class Violation(AssertionError):  # noqa: N818
    pass


class Arena:
    """One launch's storages, copied into one block of memory with guard bands, byte by byte."""

    def __init__(self, tensors: list[Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        self.regions: list[tuple[int, torch.UntypedStorage]] = []
        end = GUARD
        for storage in storages.values():
            self.regions.append((end, storage))
            end += -(-storage.nbytes() // 64) * 64 + GUARD
        self.starts = {s.data_ptr(): start for start, s in self.regions}
        self.memory = torch.full((end,), 0xFF, dtype=torch.uint8)  # NaN, -1
        self.base = self.memory.data_ptr()
        for start, storage in self.regions:
            self.memory[start : start + storage.nbytes()] = _bytes(storage)
        self.legal = np.zeros(end, dtype=bool)
        for t in tensors:
            self._allow(t)
        self.writer = np.full(end, NONE, dtype=np.int64)
        self.reader = np.full(end, NONE, dtype=np.int64)

    def _allow(self, t: Tensor) -> None:
        start, size = self.starts[t.untyped_storage().data_ptr()], t.untyped_storage().nbytes()
        cells = torch.zeros(size // t.itemsize, dtype=torch.bool)
        cells.as_strided(t.size(), t.stride(), t.storage_offset()).fill_(True)
        region = self.legal[start : start + cells.numel() * t.itemsize]
        region |= np.repeat(cells.numpy(), t.itemsize)

    def copy(self, t: Tensor) -> Tensor:
        """The tensor's twin in the arena."""
        start = self.starts[t.untyped_storage().data_ptr()] // t.itemsize
        storage, at = self.memory.untyped_storage(), start + t.storage_offset()
        return torch.empty(0, dtype=t.dtype).set_(storage, at, t.size(), t.stride())

    def write_back(self) -> None:
        for start, storage in self.regions:
            _bytes(storage).copy_(self.memory[start : start + storage.nbytes()])


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class _Launch:
    """The hooks' memory: the arena and the order of the launch that runs."""

    def __init__(self, order: int | None) -> None:
        self.shuffle = None if order is None else random.Random(order)
        self.arena: Arena | None = None
        self.kernels: list[str] = []  # names, in launch order
        self.programs: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.violation: Violation | None = None

    def set_grid(self, grid: tuple[int, ...]) -> None:
        programs = list(itertools.product(*map(range, grid)))
        shuffled = list(programs)
        if self.shuffle:
            self.shuffle.shuffle(shuffled)
        self.programs = dict(zip(programs, shuffled, strict=True))

    def fail(self, what: str) -> NoReturn:
        at = getattr(interpreter.interpreter_builder, "grid_idx", None)
        self.violation = Violation(f"{self.kernels[-1]}, program {at}: {what}")
        raise self.violation

    def access(self, kind: str, ptrs: Any, mask: Any) -> None:
        arena = self.arena
        assert arena is not None, "an access outside a launch"
        addresses, live = np.broadcast_arrays(ptrs.data, mask.data)
        first = addresses[live.astype(bool)].astype(np.int64) - arena.base
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        inside = (first >= 0) & (first <= arena.legal.size - size)
        inside[inside] = arena.legal[first[inside]] & arena.legal[first[inside] + size - 1]
        if not inside.all():
            self.fail(f"{kind} out of bounds in {int((~inside).sum())} of {first.size} lanes")
        me = self._program()
        others = (NONE, me)
        if not np.isin(arena.writer[first], others).all():
            self.fail(f"{kind} of what another program writes")
        if kind == "store":
            if np.unique(first).size != first.size:
                self.fail("store with two lanes on one address")
            if not np.isin(arena.reader[first], others).all():
                self.fail("store to what another program reads")
            for byte in range(size):
                arena.writer[first + byte] = me
            return
        alone = np.isin(arena.reader[first], others)
        for byte in range(size):
            arena.reader[first + byte] = np.where(alone, me, SEVERAL)

    def _program(self) -> int:
        builder = interpreter.interpreter_builder
        return int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))


@contextlib.contextmanager
def sanitize(order: int | None = None) -> Iterator[list[str]]:
    """See the module. Yields the names of the kernels that the interpreter runs, in order."""
    launch = _Launch(order)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx

    def to_arena(self: Any, args: Any, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        tensors = [x for x in tree_leaves((args, kwargs)) if hasattr(x, "data_ptr")]
        if not all(isinstance(x, Tensor) for x in tensors):
            raise TypeError("the sanitizer knows tensors only")
        launch.arena = arena = Arena(tensors)
        return tree_map_only(Tensor, arena.copy, (list(args), kwargs))

    def from_arena(self: Any, *_: Any) -> None:
        assert launch.arena is not None
        launch.arena.write_back()

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        launch.access("load", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launch.access("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def dim(self: Any, *grid: int) -> None:
        set_dim(self, *grid)
        launch.set_grid(grid)

    with _hooks(launch) as hook:
        hook(executor, "_init_args_hst", to_arena)
        hook(executor, "_restore_args_dev", from_arena)
        hook(builder, "create_masked_load", checked_load)
        hook(builder, "create_masked_store", checked_store)
        hook(builder, "set_grid_dim", dim)
        hook(builder, "set_grid_idx", lambda self, *at: set_idx(self, *launch.programs[at]))
        yield launch.kernels


@contextlib.contextmanager
def _hooks(launch: _Launch) -> Iterator[Callable[[Any, str, Any], Any]]:
    """The code of both kinds of run. Yields a function that replaces an attribute until the end."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    shared, call = interpreter.interpreter_builder, executor.__call__

    def checked_call(self: Any, *args: Any, **kwargs: Any) -> None:
        launch.violation = None
        launch.kernels.append(self.fn.__name__)
        try:
            call(self, *args, **kwargs)
        except InterpreterError:
            if launch.violation is not None:
                raise launch.violation from None
            raise
        finally:
            launch.arena = None

    def no_atomics(self: Any, *_: Any) -> NoReturn:
        launch.fail("an atomic operation")

    def checked_assert(self: Any, condition: Any, message: str) -> None:
        if not condition:
            launch.fail(message)

    with contextlib.ExitStack() as stack:

        def hook(owner: Any, name: str, replacement: Any) -> Any:
            return stack.enter_context(patch.object(owner, name, replacement))

        hook(executor, "__call__", checked_call)
        hook(builder, "create_atomic_rmw", no_atomics)
        hook(builder, "create_atomic_cas", no_atomics)
        hook(builder, "create_assert", checked_assert)
        checked = dict(debug=True, sanitize_overflow=True)
        hook(shared, "options", dataclasses.replace(shared.options, **checked))
        yield hook


@contextlib.contextmanager
def addresses_only() -> Iterator[list[str]]:
    """See the module. Ops of irongpt_kernels run as they are, and not their fakes."""
    launch = _Launch(None)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    ends: dict[int, int] = {}  # of each storage, whose addresses start at a multiple of 2^48
    grid: list[int] = []

    def two_programs(self: Any, args: Any, kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
        wanted = self.grid(kwargs) if callable(self.grid) else self.grid
        grid[:] = [*wanted, 1, 1][:3]
        assert math.prod(grid) > 0, "an empty grid"
        assert grid[0] < 2**31, "a grid that no GPU takes"
        assert max(grid[1:]) < 2**16, "a grid that no GPU takes"
        self.grid = (min(2, math.prod(grid)),)
        ends.clear()
        starts: dict[Any, int] = {}

        def address(t: Tensor) -> _Address:
            storage = t.untyped_storage()
            start = starts.setdefault(storage._cdata, (len(starts) + 1) << 48)
            ends[start] = start + storage.nbytes()
            return _Address(t, start + t.storage_offset() * t.itemsize)

        return tree_map_only(Tensor, address, (list(args), kwargs))

    def check(kind: str, ptrs: Any, mask: Any) -> None:
        addresses, live = np.broadcast_arrays(ptrs.data, mask.data)
        first = addresses[live.astype(bool)].astype(np.int64)
        start = first >> 48 << 48
        end = np.array([ends.get(x, 0) for x in start.tolist()])
        inside = first + ptrs.get_element_ty().primitive_bitwidth // 8 <= end
        if not inside.all():
            launch.fail(f"{kind} out of bounds in {int((~inside).sum())} of {first.size} lanes")

    def load(self: Any, ptrs: Any, mask: Any, *_: Any) -> Any:
        check("load", ptrs, mask)
        dtype = ptrs.get_element_ty()
        zeros = np.zeros(np.shape(ptrs.data), interpreter._get_np_dtype(dtype))
        return interpreter.TensorHandle(zeros, dtype)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *_: Any) -> None:
        check("store", ptrs, mask)

    def idx(self: Any, x: int, *_: int) -> None:
        set_idx(self, *((0, 0, 0) if x == 0 else (n - 1 for n in grid)))

    with _hooks(launch) as hook, _OpsThemselves():
        hook(executor, "_init_args_hst", two_programs)
        hook(executor, "_restore_args_dev", lambda *_: None)
        hook(builder, "create_masked_load", load)
        hook(builder, "create_masked_store", store)
        hook(builder, "set_grid_dim", lambda self, *_: set_dim(self, *grid))
        hook(builder, "set_grid_idx", idx)
        yield launch.kernels


class _Address(MockTensor):
    """Stands for a tensor in a launch: its dtype and its address."""

    def __init__(self, t: Tensor, address: int) -> None:
        super().__init__(t.dtype)
        self.address = address

    def data_ptr(self) -> int:  # type: ignore[override]
        return self.address


class _OpsThemselves(TorchDispatchMode):
    """A custom op on meta tensors runs, where PyTorch would call its fake."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = OPDEFS.get(op.name().split(".")[0])
        return (ours._init_fn if ours else op)(*args, **(kwargs or {}))
