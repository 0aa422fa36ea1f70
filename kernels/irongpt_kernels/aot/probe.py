"""Finds out whether tensor cores compute a GPU's matmuls, by compiling a small one per dtype."""

from irongpt_kernels.aot import sass
from irongpt_kernels.runtime import turing

TENSOR_CORES, SCALAR = "tensor cores", "scalar FMA"


def matmuls(arch: int) -> dict[str, str]:
    """dtype -> TENSOR_CORES or SCALAR, read from the instructions of a small kernel. It is compiled
    for `arch` as this package compiles its own kernels. No GPU is needed; Triton's interpreter must
    be off.

    Raises RuntimeError if this Triton cannot reach the tensor cores of sm_75.
    """
    if arch == turing.ARCH:
        turing.install()
    found = {}
    for name, dtype in dict(float32="fp32", float16="fp16", bfloat16="bf16").items():
        if dtype != "bf16" or arch >= 80:
            cubin = turing.compile_small_dot(arch, dtype, num_warps=4)["cubin"]
            found[name] = TENSOR_CORES if sass.count(sass.read(cubin))["HMMA"] else SCALAR
    return found
