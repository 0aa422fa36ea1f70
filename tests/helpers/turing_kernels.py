"""Small kernels, and how they compile, for turing_checks.py."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from irongpt_kernels.runtime import turing
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def dot_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    z = tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at), input_precision=PRECISION)
    tl.store(z_ptr + at, z)


@triton.jit
def half_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(z_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at), out_dtype=tl.float16))


@triton.jit
def two_dots_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    """One product in the type of x and y, one in that of z."""
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    z = tl.load(z_ptr + at)
    w = tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at))
    tl.store(z_ptr + at, w + tl.dot(z, z, input_precision=PRECISION))


@triton.jit
def loop_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    z = tl.zeros((N, N), tl.float32)
    for k in range(0, 4096, N):
        z = tl.dot(tl.load(x_ptr + at + k), tl.load(y_ptr + at + k * N), z)
    tl.store(z_ptr + at, z)


@triton.jit
def staged_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    z = tl.zeros((N, N), tl.float32)
    for k in tl.range(0, 4096, N, num_stages=3):
        z = tl.dot(tl.load(x_ptr + at + k), tl.load(y_ptr + at + k * N), z)
    tl.store(z_ptr + at, z)


@triton.jit
def add_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(z_ptr + i, tl.load(x_ptr + i) + tl.load(y_ptr + i))


def made(
    kernel: Any = dot_kernel, types: str = "fp16 fp16 fp32", arch: int = 75, N: int = 32, **options
) -> Any:
    names = zip(("x_ptr", "y_ptr", "z_ptr"), types.split(), strict=True)
    signature = {name: f"*{dtype}" for name, dtype in names}
    signature |= dict(N="constexpr", PRECISION="constexpr")
    constants = dict(N=N, PRECISION=options.pop("precision", "tf32"))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=dict(num_warps=1) | options)


def ptx(*args: Any, **kwargs: Any) -> str:
    return made(*args, **kwargs).asm["ptx"]


def stock(*args: Any, **kwargs: Any) -> str:
    with without():
        return ptx(*args, **kwargs)


@contextlib.contextmanager
def without() -> Iterator[None]:
    hook = knobs.runtime.add_stages_inspection_hook
    turing.uninstall()
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = hook


@contextlib.contextmanager
def saying(*wanted: str) -> Iterator[None]:
    """One warning for each text, and no other."""
    turing._warned.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    texts = [str(w.message) for w in said if "tensor cores" in str(w.message)]
    assert len(texts) == len(wanted), texts
    for text, want in zip(texts, wanted, strict=True):
        assert want in text, texts
