"""Tensor cores on Turing (sm_75: T4, RTX 20xx) with an unmodified Triton.

Since Triton 3.3, `tl.dot` below compute capability 8.0 is compiled to scalar FMAs
(triton-lang/triton#5066, #10918). Their peak rate on a T4 is an eighth of that of its tensor cores,
and tiles made for tensor cores spill. Turing's tensor cores still have mma.m16n8k8. A hook of
Triton's compiler reaches it:

    1. TTGIR is made as for sm_80, where Triton chooses the layouts of mma.sync, with one pipeline
       stage (more would use cp.async, which sm_75 lacks);
    2. LLVM IR, PTX and SASS are made for sm_75, as usual;
    3. in the PTX each mma.m16n8k16, which needs sm_80, becomes two mma.m16n8k8, which sm_75 has:

       mma.m16n8k16  d, {a0, a1, a2, a3}, {b0, b1}, c    =   mma.m16n8k8  d, {a0, a1}, {b0}, c
                                                             mma.m16n8k8  d, {a2, a3}, {b1}, d

Correctness
    D = A B + C, where A is 16 x 16 and B is 16 x 8. Lane 4g + t of a warp holds, by the fragment
    tables of the PTX ISA ("Matrix Fragments for mma.m16n8k8" and "... mma.m16n8k16", .f16):

    | register | of m16n8k16 | of m16n8k8 |
    |---|---|---|
    | a0, a1 | A[g, 2t:2t+2], A[g+8, 2t:2t+2] | the same |
    | a2, a3 | A[g, 8+2t:8+2t+2], A[g+8, 8+2t:8+2t+2] | |
    | b0 | B[2t:2t+2, g] | the same |
    | b1 | B[8+2t:8+2t+2, g] | |
    | c0..c3, d0..d3 | rows g and g+8, columns 2t and 2t+1 | the same |

    So (a0, a1), b0 are complete k8 fragments of columns 0 to 7 of A and rows 0 to 7 of B, and
    (a2, a3), b1 are those of 8 to 15; the sum over k splits into these two parts. No lane needs
    data of another. Only the rounding inside an accumulation can differ: 8 + 8 terms instead of 16.
    The first instruction writes d before the second reads a2, a3, b1. Triton gives d the same
    registers as c. The inputs of an instruction, c, a and b, have different registers. So d
    overlaps none of a2, a3, b1. If it did, the instruction would be left unchanged. The PTX would
    then have an instruction that sm_75 lacks, and the kernel would be compiled as in stock Triton,
    with a RuntimeWarning.

Scope       Only kernels for sm_75 with a dot of fp16 by fp16 are changed. Their float32 dots remain
            IEEE FMAs, as in stock Triton. Some kernels cannot be lowered this way: those with other
            dots that sm_80 gives to tensor cores, with async copies in the source, or with an
            instruction that sm_75 lacks. They compile as in stock Triton, with one RuntimeWarning.
Cache       KEY, the version of this hook, is a part of Triton's cache keys. Triton 3.7 and newer
            call the hook without arguments to get it. For Triton 3.6 it is added to the hash of the
            sm_75 backend, which is a part of every key.
Other hooks A hook that was installed before is called first. It may change the stages of the
            compilation. This hook leaves the stages alone, and replaces methods of the backend that
            the stages call. So both hooks take effect. If another hook later replaces this one, the
            next launch installs this hook again, around the other.
Threads     State belongs to one compilation; installing takes a lock.
"""

import dataclasses
import inspect
import re
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCH = 75
KEY = "irongpt-turing-1"  # part of cache keys: increment it when the lowering below changes

_DOT = re.compile(r"\btt\.dot\w* .*: tensor<(?:\d+x)+(\w+)> \* tensor<(?:\d+x)+(\w+)> -> .*")
_PRECISION = re.compile(r", inputPrecision = (\w+)")
_MMA = re.compile(
    r"^([ \t]*)mma\.sync\.aligned\.m16n8k16\.row\.col\.(f32|f16)\.f16\.f16\.\2\s*"
    r"\{([^}]*)\}\s*,\s*\{([^}]*)\}\s*,\s*\{([^}]*)\}\s*,\s*\{([^}]*)\}\s*;",
    re.MULTILINE,
)
# Instructions that sm_75 lacks and that the PTX must not contain.
_TOO_NEW = re.compile(
    r"\b(mma\.sync\S*(?<!\.m16n8k8\.row\.col\.f32\.f16\.f16\.f32)"
    r"(?<!\.m16n8k8\.row\.col\.f16\.f16\.f16\.f16)(?=[\s{])|wgmma\S*|stmatrix\S*|cp\.async\S*)"
)

_lock = threading.Lock()
_warned: set[str] = set()  # kernels for which a fallback was reported
_tensor_cores_checked = False


def _two_k8(mma: re.Match[str]) -> str:
    """Splits one instruction as in the module's docstring, unless d overlaps a2, a3 or b1."""
    indent, acc = mma.group(1, 2)
    d, a, b, c = ([r.strip() for r in g.split(",")] for g in mma.group(3, 4, 5, 6))
    if len(a) != 4 or len(b) != 2 or {*d} & {a[2], a[3], b[1]}:
        return mma.group()
    op = f"{indent}mma.sync.aligned.m16n8k8.row.col.{acc}.f16.f16.{acc}"
    out, c_in = ", ".join(d), ", ".join(c)
    return (
        f"{op} {{{out}}}, {{{a[0]}, {a[1]}}}, {{{b[0]}}}, {{{c_in}}};\n"
        f"{op} {{{out}}}, {{{a[2]}, {a[3]}}}, {{{b[1]}}}, {{{out}}};"
    )


def split_mma(ptx: str) -> str:
    """Replaces every mma.m16n8k16 of fp16 that `_two_k8` can split by two mma.m16n8k8."""
    return _MMA.sub(_two_k8, ptx)


def _ieee(dot: re.Match[str]) -> str:
    """Makes a float32 dot IEEE, as on sm_75; on sm_80 it could use tensor cores."""
    return _PRECISION.sub("", dot.group()) if dot.group(1) == "f32" else dot.group()


def _other_dots(ttir: str) -> str:
    """The operand dtypes of dots with which a kernel cannot be lowered as described above."""
    found = {f"{a} x {b}" for a, b in _DOT.findall(ttir)} - {"f16 x f16", "f32 x f32"}
    found |= {"dot_scaled"} if "tt.dot_scaled" in ttir else set()
    return ", ".join(sorted(found))


def _parse(text: str, context: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.mlir")
        path.write_text(text)
        module = ir.parse_mlir_module(str(path), context)
    module.context = context  # keeps the context alive, which the module does not own
    return module


class _Lowering:
    """The TTGIR and PTX stages of one compilation for sm_75."""

    def __init__(self, backend: Any, stages: dict[str, Any]) -> None:
        self.backend, self.stages = backend, stages
        self.ttir = ""  # of a kernel that is lowered as for sm_80, else empty
        self.given_up = False
        # The stages call these methods of their backend, which belongs to this compilation.
        backend.make_ttgir, backend.make_ptx = self.make_ttgir, self.make_ptx

    def make_ttgir(self, module: Any, metadata: Any, options: Any, capability: int) -> Any:
        stock = type(self.backend).make_ttgir
        self.ttir = ""
        text = str(module)
        dots = {match.group(1, 2) for match in _DOT.finditer(text)}
        if self.given_up or ("f16", "f16") not in dots:
            return stock(module, metadata, options, capability)
        context = module.context
        reason = _other_dots(text)
        if reason:
            reason = f"it also has a dot of {reason}"
        else:
            try:
                if ("f32", "f32") in dots:
                    module = _parse(_DOT.sub(_ieee, text), context)
                one_stage = dataclasses.replace(options, num_stages=1)
                lowered = stock(module, metadata, one_stage, 80)
            except RuntimeError as e:
                reason = f"Triton cannot lower it as for sm_80 ({e})"
            else:
                if "async_copy" not in str(lowered):
                    self.ttir = text
                    return lowered
                reason = "its source requests pipelined loops with async copies"
        _warn(text, reason)
        return stock(_parse(text, context), metadata, options, capability)

    def make_ptx(self, llir: Any, metadata: Any, options: Any, capability: int) -> str:
        stock = type(self.backend).make_ptx
        ptx = stock(self.backend, llir, metadata, options, capability)
        if not self.ttir:
            return ptx
        ptx = split_mma(ptx)
        left = _TOO_NEW.search(ptx)
        if left is None:
            return ptx
        _warn(self.ttir, f"its PTX has {left.group()}, which sm_75 lacks")
        self.given_up = True
        context = ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        module = _parse(self.ttir, context)
        llir = self.stages["llir"](self.stages["ttgir"](module, metadata), metadata)
        return stock(self.backend, llir, metadata, options, capability)


def _warn(ttir: str, reason: str) -> None:
    kernel = re.findall(r"tt\.func public @(\w+)|$", ttir)[0] or "a kernel"
    with _lock:
        if kernel in _warned:
            return
        _warned.add(kernel)
    warnings.warn(
        f"{kernel} runs slowly, without the tensor cores of sm_75: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


class Hook:
    """A hook for `knobs.runtime.add_stages_inspection_hook`. before: the hook it wraps, if any."""

    def __init__(self, before: Callable[..., Any] | None = None) -> None:
        self.before = before

    def __call__(self, *args: Any) -> tuple[str, str] | None:
        """Without arguments it returns two strings, which Triton adds to the keys of its disk cache
        and of its memory cache. With (backend, stages, options, language, capability) it changes
        how one kernel is compiled.
        """
        if not args:
            key, hashed = self.before() if self.before else ("", "")
            return f"{KEY}{key}", f"{KEY}{hashed}"
        if self.before:
            self.before(*args)
        backend, stages = args[:2]
        already = "make_ttgir" in vars(backend)
        if backend.target.backend == "cuda" and backend.target.arch == ARCH and not already:
            _Lowering(backend, stages)
        return None


def install() -> None:
    """Makes kernels that are compiled for sm_75 use its tensor cores.

    Every launch on an sm_75 GPU calls this function. Raises RuntimeError if this version of Triton
    has no hook or compiles a dot to other PTX.
    """
    if _tensor_cores_checked and isinstance(knobs.runtime.add_stages_inspection_hook, Hook):
        return
    with _lock:
        if not hasattr(knobs.runtime, "add_stages_inspection_hook"):
            raise RuntimeError(_unfit("has no hook for the stages of its compiler"))
        before = knobs.runtime.add_stages_inspection_hook
        if not isinstance(before, Hook):
            knobs.runtime.add_stages_inspection_hook = Hook(before)
            _key_the_backend()
    if not _tensor_cores_checked:
        check_tensor_cores()


def uninstall() -> None:
    """Restores the hook that was installed before."""
    with _lock:
        hook = knobs.runtime.add_stages_inspection_hook
        if isinstance(hook, Hook):
            knobs.runtime.add_stages_inspection_hook = hook.before


def _key_the_backend() -> None:
    """Puts KEY into the backend's hash for Triton 3.6, which does not ask the hook for a key."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import compiler

    asked = "add_stages_inspection_hook" in inspect.getsource(compiler.compile)
    if asked or hasattr(CUDABackend.hash, "__wrapped_by_turing__"):
        return
    stock = CUDABackend.hash

    def keyed(self: Any) -> str:
        key = stock(self)
        hooked = isinstance(knobs.runtime.add_stages_inspection_hook, Hook)
        return f"{key}-{KEY}" if hooked and self.target.arch == ARCH else key

    keyed.__wrapped_by_turing__ = True  # type: ignore[attr-defined]
    CUDABackend.hash = keyed


@triton.jit
def small_dot(a_ptr, b_ptr, c_ptr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee"))


def compile_small_dot(arch: int, dtype: str, num_warps: int) -> dict[str, Any]:
    """Compiles `small_dot` for operands such as fp16, with the current hooks. Needs no GPU. Returns
    the code by name, such as ptx and cubin."""
    pointers = dict(a_ptr=f"*{dtype}", b_ptr=f"*{dtype}", c_ptr="*fp32")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source, target = ASTSource(small_dot, pointers, {}, aligned), GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=dict(num_warps=num_warps)).asm


def small_dot_ptx() -> str:
    """The PTX of a dot of fp16 tiles for sm_75. If tensor cores are used, it has mma.sync
    instructions."""
    return compile_small_dot(ARCH, "fp16", num_warps=1)["ptx"]


def check_tensor_cores() -> None:
    """Raises RuntimeError unless `small_dot` compiles as the module's docstring describes."""
    global _tensor_cores_checked
    with warnings.catch_warnings():  # a fallback would warn, but here it raises the error below
        warnings.simplefilter("ignore")
        try:
            good = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32" in small_dot_ptx()
        except Exception as e:
            uninstall()
            raise RuntimeError(_unfit("does not compile a small test kernel")) from e
    if not good:
        uninstall()
        raise RuntimeError(_unfit("compiles a dot of fp16 to unexpected PTX"))
    _tensor_cores_checked = True


def _unfit(why: str) -> str:
    return (
        f"Triton {triton.__version__} {why}, so our kernels cannot use the tensor cores of this "
        "GPU (sm_75): install a Triton from 3.6 to 3.9, or use the builtin ops"
    )
