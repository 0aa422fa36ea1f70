"""Arithmetic as PTX defines it where NumPy's differs, on arrays with one value per thread.

u1 to u8, i1 to i8 and f2 to f8 are NumPy dtypes named by bytes, not bits as in PTX: u8 is uint64.
bfloat16 values are u2 arrays.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
UINT: dict[int, Any] = {1: u1, 2: u2, 4: u4, 8: u8}

Array = Any  # an array of a value for each thread

# Floating point -----------------------------------------------------------------------------------


def half_to_f8(x: Array) -> Array:
    """The bits of float16 numbers to float64."""
    return x.view(f2).astype(f8)


def bf16_to_f8(x: Array) -> Array:
    """The bits of bfloat16 numbers to float64."""
    return (x.astype(u4) << u4(16)).view(f4).astype(f8)


def half_of_f8(x: Array) -> Array:
    """float64 to the bits of the nearest float16."""
    return x.astype(f2).view(u2)


def bf16_of(x: Array) -> Array:
    """float32 to the nearest bfloat16, ties to even."""
    bits = x.view(u4)
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), rounded).astype(u2)


def bf16_of_f8(x: Array) -> Array:
    """float64 to the nearest bfloat16, rounded once, except for subnormal numbers."""
    bits = x.view(u8)
    low = u8((1 << 45) - 1)
    rounded = (bits + (low >> u8(1)) + ((bits >> u8(45)) & u8(1))) & ~low
    return bf16_of(np.where(np.isfinite(x), rounded.view(f8), x).astype(f4))


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a b + c in float64, then rounded to float32: about one result in 2^29 is off by an ulp."""
    return (np.multiply(a, b, dtype=f8) + c).astype(f4)


def ftz(x: Array) -> Array:
    """Subnormal float32 numbers become zeros of their sign."""
    return np.where(np.abs(x) < f4(2.0**-126), np.copysign(f4(0), x), x)


# The bounds in the PTX ISA on the errors of approximate instructions: in ulps, and relative.
_ERRORS = {"ex2": (2, 0.0), "div": (2, 0.0), "sqrt": (0, 2.0**-23), "rsqrt": (0, 2.0**-22.9)}


def approximate(name: str, x: Array, y: Array, seed: Array, noise: float) -> Array:
    """The float64 y as float32, with a pseudorandom error, determined by the seed, of at most
    `noise` times the bound of the PTX ISA. ex2 of an integer is exact, as it is on GPUs."""
    if not noise:
        return y.astype(f4)
    h = seed.astype(u8) * u8(0x9E3779B97F4A7C15)
    h = (h ^ (h >> u8(29))) * u8(0xBF58476D1CE4E5B9)
    direction = (h >> u8(40)).astype(f8) / 2**23 - 1  # -1 to 1
    ulp = np.spacing(np.abs(y).astype(f4)).astype(f8)
    ulps, relative = _ERRORS[name]
    largest = ulps * ulp + relative * np.abs(y)
    error = noise * direction * np.maximum(largest - ulp / 2, 0)
    exact = ~np.isfinite(error) | ((name == "ex2") & (x == np.rint(x)))
    return np.where(exact, y, y + error).astype(f4)


def maxf(a: Array, b: Array) -> Array:
    """The larger number, or the one that is not NaN. -0 is less than +0; NumPy leaves that open."""
    found, zero = np.fmax(a, b), (a == 0) & (b == 0)
    return np.where(zero, a + b, found) if zero.any() else found


def minf(a: Array, b: Array) -> Array:
    """The smaller number, or the one that is not NaN."""
    return -maxf(-a, -b)


def to_int(x: Array, dtype: Any) -> Array:
    """A float, already rounded to a whole number, as an integer, clamped to the range of the dtype.
    NaN becomes 0; if the source or the result has 64 bits, it becomes the number with only the top
    bit set."""
    info, y = np.iinfo(dtype), x.astype(f8)
    nan, big, small = np.isnan(y), y >= float(info.max), y <= float(info.min)
    out = np.where(nan | big | small, 0, y).astype(dtype)
    out = np.where(big, info.max, np.where(small, info.min, out))
    wide = x.dtype == f8 or info.bits == 64
    special = (info.min if info.min < 0 else 1 << (info.bits - 1)) if wide else 0
    return np.where(nan, np.array(special, dtype=dtype), out).astype(dtype)


# Integers -----------------------------------------------------------------------------------------


def div(a: Array, b: Array) -> Array:
    """Rounds towards zero. Division by zero sets all bits, as on GPUs; PTX does not specify it."""
    zero = b == 0
    quotient = (a - rem(a, b)) // np.where(zero, 1, b)
    return np.where(zero, ~np.zeros_like(a), quotient).astype(a.dtype)


def rem(a: Array, b: Array) -> Array:
    """The remainder, with the sign of a. If b is 0, it is `a`."""
    zero = b == 0
    return np.where(zero, a, np.fmod(a, np.where(zero, 1, b))).astype(a.dtype)


def shift(x: Array, n: Array, left: bool) -> Array:
    """x shifted by each thread's n. If n is the width or more, only 0 is left (or copies of the
    sign)."""
    bits = 8 * x.itemsize
    t = x.dtype.type
    some = np.minimum(n, u4(bits - 1)).astype(t)
    if left:
        return np.where(n < bits, x << some, t(0))
    return x >> some if np.issubdtype(t, np.signedinteger) else np.where(n < bits, x >> some, t(0))


def prmt(a: Array, b: Array, selector: Any) -> Array:
    """Four of the eight bytes of b:a, chosen by the nibbles of the selector. If bit 3 of a nibble
    is set, all 8 bits are the sign of the byte."""
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    selector = np.asarray(selector, dtype=u4)
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> u4(4 * i)) & u4(0xF)
        byte = ((both >> ((nibble & u4(7)).astype(u8) * u8(8))) & u8(0xFF)).astype(u4)
        sign = np.where(byte & u4(0x80), u4(0xFF), u4(0))
        out = out | (np.where(nibble & u4(8), sign, byte).astype(u4) << u4(8 * i))
    return out


# Matmuls ------------------------------------------------------------------------------------------


def accumulate_exact(C: Array, A: Array, B: Array) -> Array:
    """C + A B^T, the sum rounded once to float32."""
    return (np.matmul(A, B.swapaxes(-1, -2)) + C).astype(f4)


def accumulate_like_hardware(block: int, extra_bits: int) -> Callable[[Array, Array, Array], Array]:
    """Matmuls as measured on tensor cores (Fasi, Higham, Mikaitis, Pranesh 2021).

    Products are exact. A step adds `block` of them to the accumulator. First the products and the
    accumulator are truncated at the same bit. If e is the largest of their exponents, this bit has
    the value 2^(e - 23 - extra_bits). The sum is truncated to float32.
    """

    def accumulate(C: Array, A: Array, B: Array) -> Array:
        acc = C.astype(f8)
        for k in range(0, A.shape[-1], block):
            terms = A[..., :, None, k : k + block] * B[..., None, :, k : k + block]
            terms = np.concatenate([terms, acc[..., None]], -1)
            top = np.frexp(np.abs(terms).max(-1))[1]
            step = np.ldexp(1.0, (top - 24 - extra_bits).astype(int))[..., None]
            total = (np.trunc(terms / step) * step).sum(-1)
            ulp = np.ldexp(1.0, np.maximum(np.frexp(total)[1] - 24, -149).astype(int))
            acc = np.where(np.isfinite(total), np.trunc(total / ulp) * ulp, total)
        return acc.astype(f4)

    return accumulate
