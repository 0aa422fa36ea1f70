"""
Runs `irongpt_kernels.aot`, and passes every kernel that it compiles to Triton's own C launcher.

    python tests/helpers/launched.py sm_75 sm_80     the reports of aot, each of which gains

    launches, parameters      how many were compared
    mismatches                parameters that differ from the PTX or from the Python arguments
    injected                  the mismatches of one more case, with two arguments exchanged

The launcher is linked to a stub of libcuda (stub_cuda.c), which runs nothing. Before a launch
reaches a GPU, its arguments go through Python, Triton's flattening of tuples and constants, and C.
No interpreter and no compiler's test shows whether each arrives in the place that the PTX reads.
"""

import contextlib
import ctypes
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

NVIDIA = Path(next(iter(find_spec("triton").submodule_search_locations))) / "backends/nvidia"
SIZES = {f"{kind}{bits}": bits // 8 for kind in "usbf" for bits in (8, 16, 32, 64)}  # in bytes
SCRATCH = 2  # pointers that Triton adds at the end: global and profile scratch memory, null here
Argument = tuple[Any, str]  # a value, and its type in Triton's signature


def build_stub(folder: Path) -> ctypes.CDLL:
    """Builds libcuda.so.1 in `folder`, and loads it before anything else asks for that name."""
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("stub_cuda.c")
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", f"-I{NVIDIA / 'include'}"]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", source, "-o", library], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def flat(values: Any, signature: Any) -> list[Argument]:
    """The arguments that a kernel has at run time: without constants, tuples as their members."""
    found = []
    for value, kind in zip(values, signature, strict=True):
        if isinstance(kind, tuple):
            found += flat(value, kind)
        elif kind != "constexpr":
            found.append((value, kind))
    return found


def as_bytes(value: Any, size: int) -> bytes:
    if hasattr(value, "data_ptr"):
        return struct.pack("<Q", value.data_ptr())
    if isinstance(value, float):
        return struct.pack({4: "<f", 8: "<d"}[size], value)
    return int(value).to_bytes(size, "little", signed=value < 0)


class Check:
    """Compares what the launcher passes to CUDA with the entry of the PTX and with the arguments.

    compiling: `aot.compiling`.
    """

    def __init__(self, compiling: Any) -> None:
        self.compiling = compiling
        self.kernel: Any = None  # the kernel that is launched, and its arguments
        self.args: tuple[Any, ...] = ()
        self.begin()

    def begin(self, exchange: bool = False) -> None:
        """exchange: whether the first two pointers of a launch are exchanged on their way."""
        self.exchange = exchange
        self.launches = self.parameters = 0
        self.mismatches: list[str] = []

    def launched(self, name: bytes, grid_y: int, grid_z: int, params: Any) -> int:
        """The stub calls this for each launch. params: an array of addresses."""
        try:
            self.compare(name.decode(), params)
            if max(grid_y, grid_z) > 65_535:
                raise ValueError(f"a grid of ..., {grid_y}, {grid_z}")
        except Exception as e:  # C cannot raise it
            self.mismatches.append(f"{name.decode()}: {e!r}")
        return 0

    def compare(self, name: str, params: Any) -> None:
        entry = re.search(rf"\.entry {name}\((.*?)\)", self.kernel.asm["ptx"], re.DOTALL)
        kinds = re.findall(r"\.param \.(\w+)", entry[1])
        wanted = flat(self.args, self.kernel.src.signature.values())
        if len(kinds) != len(wanted) + SCRATCH:
            raise ValueError(f"{len(kinds)} parameters for {len(wanted)} arguments")
        wanted += [(0, "scratch")] * SCRATCH
        for i, (kind, (value, declared)) in enumerate(zip(kinds, wanted, strict=True)):
            raw = ctypes.string_at(params[i], SIZES[kind])
            if raw != as_bytes(value, SIZES[kind]):
                self.mismatches.append(f"{name}: parameter {i}, {declared}: {raw.hex()}")
        self.launches, self.parameters = self.launches + 1, self.parameters + len(kinds)

    @contextlib.contextmanager
    def launching(self, arch: int, done: Any, failed: Any, stock: bool = False) -> Iterator[None]:
        """As `aot.compiling`, and then each kernel is launched."""
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        original, check = JITFunction.run, self

        class Launcher(CudaLauncher):
            def __call__(self, *args: Any) -> None:
                first = len(args) - len(check.kernel.src.signature)  # before it: the grid, hooks
                head, check.args = args[:first], args[first:]
                super().__call__(*head, *exchanged(check.args) if check.exchange else check.args)

        def compiled(function: Any, kernel: Any) -> None:
            self.kernel = kernel
            done(function, kernel)

        with self.compiling(arch, compiled, failed, stock):
            compile_only = JITFunction.run

            def run(function: Any, *args: Any, **kwargs: Any) -> None:
                self.kernel = None
                compile_only(function, *args, **kwargs)
                if self.kernel is not None:
                    original(function, *args, **kwargs)

            driver.active.utils, driver.active.launcher_cls = CudaUtils(), Launcher
            with patch.object(JITFunction, "run", run):
                yield


def exchanged(args: tuple[Any, ...]) -> list[Any]:
    """The arguments, with the first two tensors in exchanged places."""
    at = [i for i, value in enumerate(args) if hasattr(value, "data_ptr")][:2]
    order = dict(zip(at, reversed(at), strict=True))
    return [args[order.get(i, i)] for i in range(len(args))]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        library = build_stub(Path(folder))
        from irongpt_kernels.aot import __main__ as aot
        from irongpt_kernels.aot import shapes

        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, *[ctypes.c_uint] * 2, ctypes.POINTER(ctypes.c_void_p)
        )
        check = Check(aot.compiling)
        callback = kind(check.launched)
        library.stub_on_launch(callback)
        with patch.object(aot, "compiling", check.launching):
            for arch in (int(name.removeprefix("sm_")) for name in sys.argv[1:]):
                check.begin()
                report = aot.report(arch, list(shapes.representative(arch)), quick=True)
                report |= dict(launches=check.launches, parameters=check.parameters)
                report |= dict(mismatches=check.mismatches)
                check.begin(exchange=True)
                case = next(c for c in shapes.every(arch) if c.shape == "N=1536 float16")
                aot.report(arch, [case])
                print(json.dumps(report | dict(injected=check.mismatches), indent=1))


if __name__ == "__main__":
    main()
