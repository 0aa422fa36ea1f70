"""The addresses that a kernel accesses in tensors too large for any memory.

    with addresses_only():
        fused.layer_norm(x, weight)                 x on the meta device

checks bounds and overflow for tensors of any size, in no memory: loads give 0, stores do nothing,
and of each launch the first and the last program run.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.runtime.interpreter as interpreter
from sanitizer import Report, _hooks, _Launch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.runtime.jit import MockTensor


@contextlib.contextmanager
def addresses_only() -> Iterator[Report]:
    """See the module. Ops of irongpt_kernels run as they are, and not their fakes."""
    launch, report = _Launch(None), Report()
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

    with _hooks(launch, report) as hook, _OpsThemselves():
        hook(executor, "_init_args_hst", two_programs)
        hook(executor, "_restore_args_dev", lambda *_: None)
        hook(builder, "create_masked_load", load)
        hook(builder, "create_masked_store", store)
        hook(builder, "set_grid_dim", lambda self, *_: set_dim(self, *grid))
        hook(builder, "set_grid_idx", idx)
        yield report


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
