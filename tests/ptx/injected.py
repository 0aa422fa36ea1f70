"""Bugs injected into compiled kernels, one at a time: does the execution of the PTX find each one?

    python -m tests.ptx.injected --arch sm_75 sm_80 sm_90 [--only hook] [--barriers] [--random 70]

The named bugs are mistakes that a kernel, the compiler or the hook of `runtime.turing` could make.
--barriers leaves out each barrier of some kernels, --random changes single instructions. The exit
code is 1 if a named bug is not found.
"""

import argparse
import contextlib
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"  # before anything imports Triton

import torch
from irongpt_kernels import fused
from irongpt_kernels.fused import attention_tiles
from irongpt_kernels.op_inputs import RowShape
from irongpt_kernels.op_specs import SPECS
from irongpt_kernels.ptx import driver
from irongpt_kernels.runtime import checks

from tests.ptx import cases
from tests.ptx.cases import Case

ALL = (75, 80, 90)


def case(op: str, dtype: str = "float16", **sizes: int) -> Case:
    spec = SPECS[op]
    at = RowShape(**{**dict(B=1, H=1, T=70, D=64, M=5, N=1000, V=300), **sizes})
    return Case(spec.full_rows or spec, " ".join(map(str, sizes.values())), dtype, at, 0.2)


ATTENTION, NORM = case("causal_attention"), case("layer_norm")
LOSS = case("linear_cross_entropy", N=16, V=3000)
HEAD = case("causal_attention", T=150)  # its backward has two loops


@dataclass(frozen=True)
class Bug:
    """pattern is replaced by new in the PTX of the kernel: everywhere, or where it occurs for the
    n-th time."""

    name: str
    case: Case
    kernel: str
    pattern: str
    new: str
    archs: tuple[int, ...] = ALL
    n: int | None = None

    def change(self, ptx: str) -> str:
        if self.n is None:
            return re.sub(self.pattern, self.new, ptx)
        found = list(re.finditer(self.pattern, ptx))[self.n]
        return ptx[: found.start()] + found.expand(self.new) + ptx[found.end() :]


_K8 = r"(mma\S+m16n8k8\S+ \{[^}]*\}, \{[^}]*\}, \{)([^}]*)(\}, \{[^}]*\};\s*)"
BUGS = [
    Bug("hook: b0 and b1 swapped", ATTENTION, "_fwd_kernel", _K8 + _K8, r"\1\5\3\4\2\6", (75,)),
    Bug("hook: the second half left out", ATTENTION, "_bwd_dkdv_kernel",
        r"(mma\S+m16n8k8[^;]*;\s*)mma\S+m16n8k8[^;]*;", r"\1", (75,)),
    Bug("mma: a1 and a2 swapped", ATTENTION, "_fwd_kernel",
        r"(mma\S+ \{[^}]*\}, \{\s*%r\d+, )(%r\d+), (%r\d+)", r"\1\3, \2", (80,)),
    Bug("cp.async is not waited for", ATTENTION, "_fwd_kernel", r"cp\.async\.wait_group[^;]*;", "",
        (80, 90)),
    Bug("cp.async: two groups may be in flight", ATTENTION, "_bwd_dq_kernel",
        r"cp\.async\.wait_group\s+0", "cp.async.wait_group 2", (80,)),
    Bug("wgmma: another swizzle", ATTENTION, "_fwd_kernel",
        r"(or\.b64\s+%rd\d+, %rd\d+, )4611686", r"\g<1>9223372", (90,), 0),
    Bug("wgmma is not waited for", ATTENTION, "_bwd_dq_kernel",
        r"wgmma\.wait_group\.sync\.aligned[^;]*;", "", (90,)),
    Bug("ldmatrix 16 bytes off", ATTENTION, "_bwd_dq_kernel", r"(ldmatrix[^;]*\[%r\d+)\]",
        r"\1+16]", n=0),
    Bug("mask: column N is read", case("layer_norm", N=1001), "_fwd_kernel", r"setp\.lt\.s32",
        "setp.le.s32"),
    Bug("mask: row T is stored", ATTENTION, "_bwd_dkdv_kernel", r"setp\.lt\.s64", "setp.le.s64"),
    Bug("shuffle with another lane", NORM, "_fwd_kernel",
        r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )4,", r"\g<1>8,", n=2),
    Bug("2^x in place of e^x", case("softmax", "float32"), "_fwd_kernel", "0f3FB8AA3B",
        "0f3F800000"),
    Bug("a parameter 8 bytes off", NORM, "_fwd_kernel", r"_param_1\]", "_param_2]", n=0),
    Bug("another constant of Philox", case("causal_attention", T=33), "_bwd_dkdv_kernel",
        "-766435501", "-766435503"),
    Bug("dropout's threshold one off", case("causal_attention", T=33), "_fwd_kernel",
        r"(setp\.gt\.u32\s+%p\d+, %r\d+, )50;", r"\g<1>51;"),
    Bug("16 bytes are stored 2 bytes off", case("layer_norm", N=1024), "_fwd_kernel",
        r"(st\.global\.v4\.b32 \[ %rd\d+) \+ 0 \]", r"\1 + 2 ]", n=0),
    Bug("head: wgmma is not waited for", HEAD, "_bwd_head_kernel",
        r"wgmma\.wait_group\.sync\.aligned[^;]*;", "", (90,)),
    Bug("head: row T is stored", HEAD, "_bwd_head_kernel", r"setp\.lt\.s64", "setp.le.s64", (90,)),
    Bug("head: dropout's threshold one off", HEAD, "_bwd_head_kernel",
        r"(setp\.gt\.u32\s+%p\d+, %r\d+, )50;", r"\g<1>51;", (90,)),
    Bug("head: another constant of Philox", HEAD, "_bwd_head_kernel", "-766435501", "-766435503",
        (90,)),
    Bug("a barrier left out", NORM, "_fwd_kernel", r"bar\.sync\s+0;", "", n=0),
    Bug("a gradient over the next logits", LOSS, "_row_kernel",
        r"(st\.global\.v4\.b32 \[ %rd\d+) \+ 0 \]", r"\1 + 16 ]", n=0),
    Bug("a sum of a row without a barrier", LOSS, "_row_kernel", r"bar\.sync\s+0;", "", n=2),
]  # fmt: skip
QUICK = "hook: b0|head: wgmma|wgmma is|cp.async is|mask: row|a parameter|a barrier"


def found(case: Case, arch: int, kernel: str, change: Callable[[str], str]) -> list[str]:
    """The problems of a case whose kernel is changed. Raises LookupError if it stays the same."""
    changed = False
    pair = kernel in ("_bwd_dq_kernel", "_bwd_dkdv_kernel")
    longest = 0 if pair else attention_tiles.MAX_HEAD_CONTEXT  # whose backward is one kernel

    def mutate(name: str, ptx: str) -> str:
        nonlocal changed
        new = change(ptx) if name == kernel else ptx
        changed = changed or new != ptx
        return new

    with patch.object(attention_tiles, "MAX_HEAD_CONTEXT", longest):
        problems = cases.execute(case, arch, change=mutate).problems
    if not changed:
        raise LookupError(f"{kernel} of {case.name} has no place for this bug on sm_{arch}")
    return problems


def unaligned_weight(arch: int) -> list[str]:
    """A weight at an address that adamw promises the compiler not to have."""
    weight, moments = torch.zeros(1601)[1:], [torch.zeros(1600) for _ in range(2)]
    unchecked = patch.object(checks, "addresses", lambda *_, **__: None)
    with unchecked, driver.emulating(arch) as report:
        fused.adamw(
            [weight], [], [torch.ones(1600)], *([x] for x in moments), torch.ones(1),
            torch.tensor(1e-3), torch.tensor([1.0, 1.0, 0.0]),
            beta1=0.9, beta2=0.99, weight_decays=[0.0],
        )  # fmt: skip
    return report.lines()


def too_little_shared_memory(arch: int) -> list[str]:
    """A kernel that asks for 256 bytes less than it uses."""
    execute = driver.execute

    def less(ptx: str, grid: Any, arguments: Any, shared: int, *rest: Any) -> None:
        execute(ptx, grid, arguments, shared - 256 if shared > 1024 else shared, *rest)

    with patch.object(driver, "execute", less):
        return cases.execute(ATTENTION, arch).problems


def barriers(arch: int) -> list[tuple[Case, str]]:
    """Kernels that share data between warps."""
    head = [(HEAD, "_bwd_head_kernel")] if arch == 90 else []
    return [
        *((ATTENTION, kernel) for kernel in ("_fwd_kernel", "_bwd_dq_kernel", "_bwd_dkdv_kernel")),
        *((case("layer_norm", N=1500), kernel) for kernel in ("_fwd_kernel", "_bwd_kernel")),
        (case("gelu", M=40, N=75), "_bwd_kernel"),
        *head,
    ]


def without_barriers(arch: int) -> Iterator[tuple[str, list[int], int]]:
    """Of each kernel: its name, which barriers can be left out unnoticed, and how many it has."""
    for case, kernel in barriers(arch):
        missed, n = [], 0
        with contextlib.suppress(LookupError):  # after the last barrier
            while True:
                bug = Bug("", case, kernel, r"bar\.sync\s+0;", "", n=n)
                missed += [n] * (not found(case, arch, kernel, bug.change))
                n += 1
        yield f"{case.name} {kernel}", missed, n


RULES = [  # changes of one instruction
    (r"setp\.lt\.", "setp.le."), (r"setp\.gt\.", "setp.ge."), (r"setp\.le\.", "setp.lt."),
    (r"setp\.ge\.", "setp.gt."), (r"add\.s32", "sub.s32"), (r"add\.s64", "sub.s64"),
    (r"xor\.b32", "or.b32"), (r"and\.b32", "or.b32"), (r"add\.f32", "sub.f32"),
    (r"fma\.rn\.f32(\s+%r\d+, )(%r\d+, %r\d+, )%r\d+", r"mul.rn.f32\1\2"),
    (r"mul\.f32(\s+%r\d+, )", r"add.f32\1"), (r"max\.f32", "min.f32"),
    (r"selp\.(\w+)(\s+%\w+, )([^,]+), ([^,]+),", r"selp.\1\2\4, \3,"), (r"shr\.u32", "shl.b32"),
    (r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )(\d+)", r"\g<1>31"), (r"bar\.sync\s+0;", ""),
    (r"(ldmatrix[^;]*\.x4)(\.trans)(\.shared[^;]*;)", r"\1\3"),
    (r"(st\.shared\.\S+\s*\[ %r\d+ \+ )0", r"\g<1>16"),
    (r"(ld\.shared\S*\s+[^\[]*\[%r\d+)\]", r"\1+16]"),
    (r"(ld\.global\S*\s+[^\[]*\[ %rd\d+ \+ )0", r"\g<1>16"),
    (r"(st\.global\S*\s+\[ %rd\d+ \+ )0", r"\g<1>16"),
    (r"ex2\.approx\.ftz\.f32", "rsqrt.approx.ftz.f32"),
    (r"cvt\.rn\.f16\.f32(\s+%rs\d+), (%r\d+)", r"mov.b16\1, 0"),
]  # fmt: skip


def random_change(ptx: str, generator: random.Random) -> tuple[str, str]:
    """The PTX with one instruction changed, and that instruction."""
    body = ptx.index("ld.param")
    by_rule = [
        [(m, new) for m in re.finditer(pattern, ptx) if m.start() > body] for pattern, new in RULES
    ]
    m, new = generator.choice(generator.choice([spots for spots in by_rule if spots]))
    line = ptx[ptx.rfind("\n", 0, m.start()) + 1 : ptx.find("\n", m.end())].strip()
    return ptx[: m.start()] + m.expand(new) + ptx[m.end() :], line


def random_bugs(arch: int, count: int) -> Iterator[tuple[str, str, list[str]]]:
    """Kernel, changed instruction, problems."""
    generator = random.Random(1)
    places = [*barriers(arch), (case("cross_entropy", M=9, V=5000), "_fwd_kernel")]
    for i in range(count):
        where, kernel = places[i % len(places)]
        lines: dict[str, tuple[str, str]] = {}

        def change(ptx: str, lines: dict[str, tuple[str, str]] = lines) -> str:
            if ptx not in lines:  # a kernel that is launched twice gets the same change
                lines[ptx] = random_change(ptx, generator)
            return lines[ptx][0]

        problems = found(where, arch, kernel, change)
        yield f"{where.name} {kernel}", " ".join(x for _, x in lines.values()), problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.injected", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    help = "architectures: sm_75, sm_80, sm_90 [sm_75]"
    parser.add_argument("--arch", nargs="+", metavar="SM", default=["sm_75"], help=help)
    help = "inject the named bugs whose name contains this text [all named bugs]"
    parser.add_argument("--only", metavar="TEXT", default="", help=help)
    parser.add_argument("--quick", action="store_true", help="inject only a few of the named bugs")
    parser.add_argument("--barriers", action="store_true", help="also leave out each barrier")
    help = "also change N instructions, chosen at random, one at a time [0]"
    parser.add_argument("--random", type=int, metavar="N", default=0, help=help)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    count = missed = 0
    for arch in (int(name.removeprefix("sm_")) for name in args.arch):
        runs: list[tuple[str, Callable[[], list[str]]]] = []
        for bug in BUGS:
            if arch in bug.archs and (not args.quick or re.match(QUICK, bug.name)):
                runs.append((bug.name, lambda b=bug, a=arch: found(b.case, a, b.kernel, b.change)))
        if not args.quick:
            runs.append(("an unaligned weight", lambda a=arch: unaligned_weight(a)))
            runs.append(("too little shared memory", lambda a=arch: too_little_shared_memory(a)))
        for name, run in runs:
            if args.only in name:
                problems = run()
                count, missed = count + 1, missed + (not problems)
                print(f"sm_{arch} {name}: {problems[0] if problems else 'NOT FOUND'}"[:250])
        if args.barriers:
            for name, survivors, total in without_barriers(arch):
                print(f"sm_{arch} {name}: {total} barriers, not missed if left out: {survivors}")
        for name, line, problems in random_bugs(arch, args.random):
            print(f"sm_{arch} {name} {line}: {problems[0] if problems else 'survived'}"[:250])
    print(f"{count} named bugs, {missed} not found")
    return 1 if missed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
