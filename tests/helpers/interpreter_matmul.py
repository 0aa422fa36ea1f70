"""Triton's interpreter under test: matmuls like a GPU's, and most of its time saved.

The matmuls are those of `irongpt_kernels.runtime.interpreter`. The rest changes no result:

- The interpreter patches all of triton.language again at every call of a device function (a jitted
  function that a kernel calls). The launch has patched it already, except `triton.language.core`,
  whose patches stay until the process ends.
- The attributes of a type, and of a tensor those that follow from its type, are computed once.
- What becomes of the two operands of an operation follows from their dtypes and is computed once.
  Then NumPy broadcasts them, and the interpreter need not.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from irongpt_kernels.runtime.interpreter import repeatable_matmuls
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction

_patched: set[int] = set()  # modules of device functions whose language has been patched
_block_init, _tensor_init = tl.block_type.__init__, tl.tensor.__init__
_blocks: dict[Any, dict[str, Any]] = {}
_tensors: dict[str, dict[str, Any]] = {}
_numpy: dict[str, Any] = {}
_operands: dict[Any, list[Any] | None] = {}
_shapes: dict[Any, tuple[int, ...]] = {}
_np_dtype: Callable[[Any], Any] = interpreter._get_np_dtype
_type_checked = TritonSemantic.binary_op_type_checking_impl


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    variables = self.fn.__globals__
    if id(variables) not in _patched:
        if not any(x is tl for x in variables.values()):
            interpreter._patch_lang(self.fn)
        _patched.add(id(variables))
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as e:
        raise InterpreterError(repr(e)) from e


def _make_block(self: Any, element_ty: Any, shape: Any) -> None:
    key = element_ty.name, tuple([getattr(n, "value", n) for n in shape])
    if key not in _blocks:
        _block_init(self, element_ty, shape)
        _blocks[key] = dict(vars(self))
    self.__dict__.update(_blocks[key])


def _make_tensor(self: Any, handle: Any, type: Any) -> None:
    name = type.name
    if name not in _tensors:
        _tensor_init(self, handle, type)
        _tensors[name] = {key: x for key, x in vars(self).items() if key != "handle"}
    self.handle = handle
    self.__dict__.update(_tensors[name])


def _dtype_of(tt_dtype: Any) -> Any:
    name = tt_dtype.name
    if name not in _numpy:
        _numpy[name] = _np_dtype(tt_dtype)
    return _numpy[name]


def _check_operands(self: Any, x: Any, y: Any, *options: bool) -> tuple[Any, Any]:
    """Tensors of the type of the operation. Their data may be smaller than that by broadcasting."""
    kinds = [z.dtype.name if isinstance(z, tl.tensor) else (type(z), repr(z)) for z in (x, y)]
    key = (*kinds, options)
    if key not in _operands:  # numbers as tensors, or nothing where a tensor is cast
        made = _type_checked(self, _scalar(x), _scalar(y), *options)
        numbers = [m if isinstance(k, tuple) else None for m, k in zip(made, kinds, strict=True)]
        cast = any(m.dtype.name != k for m, k in zip(made, kinds, strict=True) if type(k) is str)
        _operands[key] = None if cast else numbers
    found = _operands[key]
    if found is None:
        return _type_checked(self, x, y, *options)
    x, y = (z if n is None else n for z, n in zip((x, y), found, strict=True))
    shapes = tuple(getattr(x.type, "shape", ())), tuple(getattr(y.type, "shape", ()))
    if shapes not in _shapes:
        _shapes[shapes] = np.broadcast_shapes(*shapes)
    wide = _shapes[shapes]
    if shapes[0] != wide:
        x = tl.tensor(x.handle, tl.block_type(x.dtype, list(wide)))
    if shapes[1] != wide:
        y = tl.tensor(y.handle, tl.block_type(y.dtype, list(wide)))
    return x, y


def _scalar(x: Any) -> Any:
    """A tensor of one element in place of x, of its dtype. A number stays one."""
    if not isinstance(x, tl.tensor):
        return x
    data = np.zeros(1, interpreter._get_np_dtype(x.dtype))
    return tl.tensor(interpreter.TensorHandle(data, x.dtype), x.dtype)


@contextmanager
def repeatable() -> Iterator[None]:
    with repeatable_matmuls(), ExitStack() as stack:
        for owner, name, new in (
            (InterpretedFunction, "__call__", _call),
            (tl.block_type, "__init__", _make_block),
            (tl.tensor, "__init__", _make_tensor),
            (TritonSemantic, "binary_op_type_checking_impl", _check_operands),
            (interpreter, "_get_np_dtype", _dtype_of),
        ):
            stack.enter_context(patch.object(owner, name, new))
        yield
