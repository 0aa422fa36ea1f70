"""e^x for the weights of a softmax, accurate for large negative x as well.

`tl.exp(x)` is compiled to 2^(x log2 e). The rounding error of the product x log2 e grows with |x|,
and so does the relative error of the result. In a softmax of few elements such errors do not
average out, and they would exceed our tolerance. Here x = n ln 2 + r with |r| <= 0.35, and
e^x = 2^n 2^(r log2 e), so that only the small r is multiplied. ln 2 is the sum of LN2_HIGH, of 15
bits, and LN2_LOW. So n LN2_HIGH is exact for |n| < 512, and r = x - n LN2_HIGH - n LN2_LOW is
accurate.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-200.0)  # e^-200 is 0 in float32; the limit keeps n LN2_HIGH exact
LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693145751953125)  # 15 bits of ln 2
LN2_LOW = tl.constexpr(1.4286068203094172e-06)  # the rest


@triton.jit
def exp(x):
    """e^x for x <= 0 in float32, or NaN for NaN."""
    x = tl.where(x < LOWEST, LOWEST, x)
    n = tl.floor(x * LOG2E + 0.5)
    r = x - n * LN2_HIGH - n * LN2_LOW
    return tl.exp2(r * LOG2E) * tl.exp2(n)
