"""
Tests of `turing`, `aot`, `launch_table` and `doctor` by compiling. test_turing.py runs pytest on
this file in another process, where Triton compiles and does not interpret.
"""

import contextlib
import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from irongpt_kernels.aot import __main__ as aot
from irongpt_kernels.aot import sass
from irongpt_kernels.fused import attention_tiles
from irongpt_kernels.runtime import launch, launch_table, turing
from numerics import randn
from triton import knobs
from turing_kernels import (
    add_kernel,
    dot_kernel,
    half_kernel,
    loop_kernel,
    made,
    ptx,
    saying,
    staged_kernel,
    stock,
    two_dots_kernel,
    without,
)

from irongpt import doctor

MMA = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"


@pytest.fixture(scope="module", autouse=True)
def _new_cache(tmp_path_factory) -> None:
    """What is in a cache compiles no more, and warns no more."""
    knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
    turing.install()


def test_stock_triton_has_no_tensor_cores() -> None:
    with without():
        kernel = made()
    assert "mma" not in kernel.asm["ptx"]
    n = sass.count(sass.read(kernel.asm["cubin"]))
    assert n["HMMA"] == 0
    assert n["FFMA"] > 500, n


def test_fp16_runs_on_tensor_cores() -> None:
    kernel = made()
    assert kernel.asm["ptx"].count(MMA) == kernel.asm["ptx"].count("mma.sync") == 32
    names = [x.name for x in sass.read(kernel.asm["cubin"])]
    assert names.count("HMMA.1688.F32") == 32
    assert not any(x.startswith("FFMA") for x in names)


def test_fp16_accumulators_too() -> None:
    kernel = made(half_kernel, "fp16 fp16 fp16")
    names = [x.name for x in sass.read(kernel.asm["cubin"])]
    assert names.count("HMMA.1688.F16") == 32


def test_stages_of_an_option_are_one() -> None:
    with saying():
        assert MMA in ptx(loop_kernel, num_stages=3)


def test_other_kernels_and_gpus_are_unchanged() -> None:
    plans: list[dict[str, Any]] = [
        *(dict(types="fp32 fp32 fp32", precision=precision) for precision in ("ieee", "tf32")),
        *(dict(kernel=add_kernel, types=f"{x} {x} {x}") for x in ("fp16", "fp32")),
        *(dict(arch=arch) for arch in (80, 86, 89, 90)),
        dict(types="bf16 bf16 fp32"),
    ]
    with saying():
        for plan in plans:
            assert ptx(**plan, N=16) == stock(**plan, N=16), plan


def test_float32_is_unchanged_next_to_fp16() -> None:
    with saying():
        text = ptx(two_dots_kernel)
    assert MMA in text
    assert "tf32" not in text
    assert text.count("fma.rn.f32") >= 32 * 32


def test_unsupported_kernels_are_unchanged_with_one_warning() -> None:
    other = two_dots_kernel, "fp16 fp16 bf16"
    with saying("two_dots_kernel runs slowly, without", "staged_kernel runs slowly, without"):
        for num_warps in (1, 2):
            same = dict(N=16, num_warps=num_warps)
            assert ptx(*other, **same) == stock(*other, **same)
            assert ptx(staged_kernel, **same) == stock(staged_kernel, **same)


def test_unknown_ptx_falls_back() -> None:
    with (
        saying("m16n8k16"),
        patch.object(turing, "split_mma", lambda text: text),
        patch.object(turing, "KEY", "not known"),  # in a separate cache key
    ):
        assert ptx(N=16) == stock(N=16)


def test_a_lowering_that_fails_falls_back() -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such pass")

    with (
        saying("no such pass"),
        patch.object(turing.dataclasses, "replace", fail),
        patch.object(turing, "KEY", "fails"),
    ):
        assert ptx(N=16) == stock(N=16)


@pytest.mark.parametrize("first", [True, False])
def test_hooks_compose(first: bool) -> None:
    """One that watches TTGIR, installed before ours, or after it and calling it."""
    seen: list[str] = []
    ours: Any = None

    def watch(*args: Any) -> Any:
        if not args:
            key, hashed = ours() if ours else ("", "")
            return f"watch{key}", f"watch{hashed}"
        if ours:
            ours(*args)
        stages = args[1]
        ttgir = stages["ttgir"]

        def watched(module: Any, metadata: Any) -> Any:
            module = ttgir(module, metadata)
            seen.append(str(module))
            return module

        stages["ttgir"] = watched
        return None

    with without():
        if not first:
            turing.install()
            ours = knobs.runtime.add_stages_inspection_hook
        knobs.runtime.add_stages_inspection_hook = watch
        turing.install()
        keys = knobs.runtime.add_stages_inspection_hook()
        assert all("watch" in key and turing.KEY in key for key in keys), keys
        with patch.object(turing, "KEY", f"first {first}"):
            assert ptx(N=16).count("mma.sync") == ptx(N=16).count(MMA) == 4
    assert ["nvidia_mma" in text for text in seen] == [True]


def test_install_again_is_the_same() -> None:
    hook = knobs.runtime.add_stages_inspection_hook
    turing.install()
    assert knobs.runtime.add_stages_inspection_hook is hook


@pytest.mark.parametrize("hooked_first", [True, False])
def test_the_cache_keeps_both_kinds_apart(tmp_path, hooked_first: bool) -> None:
    """One folder, with and without the hook, in either order, and for other GPUs the same entry."""
    kernels = {}
    with patch.object(knobs.cache, "dir", str(tmp_path)):
        for hooked in (hooked_first, not hooked_first, hooked_first):
            with contextlib.nullcontext() if hooked else without():
                kernels[hooked] = made()
            assert (MMA in kernels[hooked].asm["ptx"]) == hooked
    assert kernels[True].hash != kernels[False].hash


def test_threads(tmp_path) -> None:
    """GPUs of two kinds, kernels that are served and others, all at a time."""
    plans = [
        dict(arch=arch, N=N, types=types)
        for N in (16, 32)
        for arch in (75, 90)
        for types in ("fp16 fp16 fp32", "fp32 fp32 fp32")
    ]
    alone = [ptx(**plan) for plan in plans]
    with without(), patch.object(knobs.cache, "dir", str(tmp_path)):
        together: dict[int, str] = {}

        def work(i: int) -> None:
            turing.install()
            together[i] = ptx(**plans[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(plans))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [together[i] for i in range(len(plans))] == alone
        assert not isinstance(knobs.runtime.add_stages_inspection_hook.before, turing.Hook)


def test_a_triton_without_the_hook_is_reported() -> None:
    bare = SimpleNamespace(runtime=SimpleNamespace())
    with patch.object(turing, "knobs", bare), patch.object(turing, "_tensor_cores_checked", False):
        _assert_refused("no hook")


def test_a_triton_with_other_ptx_is_reported() -> None:
    with (
        without(),
        patch.object(turing, "split_mma", lambda text: text),
        patch.object(turing, "KEY", "other ptx"),
        patch.object(turing, "_tensor_cores_checked", False),
    ):
        _assert_refused("unexpected PTX")
        assert knobs.runtime.add_stages_inspection_hook is None


def _assert_refused(why: str) -> None:
    with pytest.raises(RuntimeError) as e:
        turing.install()
    assert why in str(e.value)
    assert "install a Triton" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_launch_on_sm_75_installs_it_and_no_other() -> None:
    for arch in (90, 75):
        with (
            without(),
            patch.object(launch, "architecture", lambda device, arch=arch: arch),
            patch.object(torch.cuda, "device", contextlib.nullcontext),
        ):
            launch.device_context(torch.device("cuda", 0))
            hook = knobs.runtime.add_stages_inspection_hook
            assert isinstance(hook, turing.Hook) == (arch == 75)


def test_a_launch_compiles_with_it() -> None:
    """The path of `kernel[grid](...)`, for GPUs of two kinds in one process."""
    x = randn(32, 32, dtype=torch.float16)
    z = x.float()
    for arch in (75, 90, 75):
        done: list[Any] = []
        with aot.compiling(arch, lambda f, kernel: done.append(kernel), _raise):  # noqa: B023
            dot_kernel[(1,)](x, x, z, 32, "tf32", num_warps=1)
        assert (MMA in done[0].asm["ptx"]) == (arch == 75)


def _raise(function: Any, e: Exception) -> None:
    raise e


def test_spills_are_seen() -> None:
    """So what test_compile.py requires of the kernels can fail."""
    kernel = made(N=64, maxnreg=64)  # for 128 accumulators a thread
    registers, stack = sass.usage(kernel.asm["cubin"])
    assert stack > 0
    found = sass.read(kernel.asm["cubin"])
    assert sass.count(found)["LOCAL"] > 0
    assert sass.warps_per_sm(75, registers, kernel.metadata.shared, 1) < 8
    with patch.object(sass, "_cuobjdump") as called:
        assert sass.read(kernel.asm["cubin"]) == found
    called.assert_not_called()  # the text is kept


def test_compiled_kernels_are_printed_and_written(tmp_path, capsys) -> None:
    assert aot.main(["--only", "embed_tokens C=384", "--dump", str(tmp_path)]) == 0
    files = [*tmp_path.iterdir()]
    title, _, heading, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("sm_75, Triton ")
    assert heading.split() == list(aot.COLUMNS)
    assert {row.split()[0] for row in rows} == {"decode_tokens._embed_kernel"}
    assert len(files) == 3 * len(rows)
    contents = {file.suffix: file.read_bytes() for file in files}
    assert b".target sm_75" in contents[".ptx"]
    assert b"EXIT" in contents[".sass"]
    assert contents[".cubin"].startswith(b"\x7fELF")


def test_a_launch_compiles_with_measured_options() -> None:
    cases = [c for c in aot.shapes.every(90) if c.shape == "N=1536 no bias float16"]
    tile = dict(BLOCK_M=2, BLOCK_N=1024, num_warps=4)
    table = {(f"gelu {name}", 1536, 2): tile for name in ("forward", "backward")}
    launch_table.use(torch.device("cpu"), table)
    assert [row["warps"] for row in aot.report(90, cases, quick=True)["kernels"]] == [4, 4]


def test_doctor_compiles_matmuls_to_find_tensor_cores() -> None:
    report = doctor.Report()
    doctor._matmuls(report, torch.device("cpu"))
    line = " ".join(str(report).split())
    assert "float32 uses scalar FMA, float16 uses tensor cores (sm_75)" in line, line


def test_stock_attention_has_no_tensor_cores() -> None:
    case = next(c for c in aot.shapes.every(75) if c.shape == "D=16 p=0.0 T=256 float16")
    tile = dict(BLOCK_M=16, BLOCK_N=16, num_warps=1, num_stages=1)  # scalar, it unrolls far
    with patch.object(attention_tiles, "default_tiles", lambda *args: tile):
        rows = aot.report(75, [case], stock=True)["kernels"]
    assert len(rows) == 3
    assert all(r["kernel_HMMA"] == 0 and r["kernel_FFMA"] > 300 for r in rows), aot.table(rows)
