"""Each kind of wrong access is reported by the emulator, and its correct neighbour is not."""

import numpy as np
import pytest
import torch
from irongpt_kernels.ptx import regions
from irongpt_kernels.ptx.execute import Options, execute
from irongpt_kernels.ptx.threads import Report
from torch import Tensor

from tests.ptx.text import program, run

I32 = torch.int32
# %rd20 is the address of word i of the first parameter in thread i, %r1 that in shared memory.
START = """mul.wide.u32 %rd20, %r0, 4; add.s64 %rd20, %rd0, %rd20;
mov.b32 %r1, global_smem; mad.lo.s32 %r1, %r0, 4, %r1; mov.b32 %r2, global_smem;"""
FILL = "st.shared.b32 [%r1], %r0; "


def report(body: str, x: Tensor | None = None, threads: int = 64, **options: object) -> Report:
    x = torch.zeros(64, dtype=I32) if x is None else x
    return run(f"{START} {body}", x, threads=threads, shared=256, **options)  # type: ignore[arg-type]


CORRECT = [
    "ld.global.b32 %r20, [%rd20];",
    "setp.lt.u32 %p20, %r0, 8; @%p20 ld.global.b32 %r20, [%rd20+224];",
    f"{FILL} bar.sync 0; xor.b32 %r3, %r1, 128; ld.shared.b32 %r20, [%r3];",
    f"{FILL} ld.shared.b32 %r20, [%r1]; bar.sync 0; st.shared.b32 [%r1], %r20;",
    "mov.b32 %r9, 7; st.shared.b32 [%r2], %r9;",  # copies of one value
    "st.global.b32 [%rd20], %r0; bar.sync 0; ld.global.b32 %r20, [%rd0];",
    "shfl.sync.bfly.b32 %r20, %r0, 1, 31, -1;",
    "cp.async.ca.shared.global [%r1], [%rd20], 4; cp.async.commit_group; cp.async.wait_group 0;"
    "bar.sync 0; ld.shared.b32 %r20, [%r2];",
]
WRONG = [
    ("out of bounds", "ld.global.b32 %r20, [%rd20+4];"),
    ("out of bounds", "ld.global.b32 %r20, [%rd20+-4];"),
    ("out of bounds", "st.global.b32 [%rd20+4], %r0;"),
    ("out of bounds", f"{FILL} bar.sync 0; ld.shared.b32 %r20, [%r1+4];"),
    ("out of bounds", "st.shared.b32 [%r1+4], %r0;"),
    ("misaligned", "ld.global.b32 %r20, [%rd20+2];"),
    ("misaligned", "ld.global.v2.b32 {%r20, %r21}, [%rd0+4];"),
    ("misaligned", "st.shared.b32 [%r1+2], %r0;"),
    ("read of unwritten shared memory", "ld.shared.b32 %r20, [%r1];"),
    ("race between warps", f"{FILL} xor.b32 %r3, %r1, 128; ld.shared.b32 %r20, [%r3];"),
    ("race between warps", f"{FILL} bar.sync 0; xor.b32 %r3, %r1, 128; ld.shared.b32 %r20, [%r3];"
     "st.shared.b32 [%r1], %r0;"),
    ("race between warps", "st.global.b32 [%rd20], %r0; ld.global.b32 %r20, [%rd0];"),
    ("race between warps", "ld.global.b32 %r20, [%rd0]; st.global.b32 [%rd20], %r0;"),
    ("race between warps", "st.global.b32 [%rd0], 1;"),
    ("lanes store different values", "setp.lt.u32 %p20, %r0, 32; @%p20 st.global.b32 [%rd0], %r0;"),
    ("lanes store different values", "setp.lt.u32 %p20, %r0, 32; @%p20 st.shared.b32 [%r2], %r0;"),
    ("lanes store different values", f"or.b32 %r9, %r0, {0x7F800000}; st.shared.b32 [%r2], %r9;"),
    ("incomplete warp", "setp.lt.u32 %p20, %r0, 8; @%p20 bra $L_end;"
     "shfl.sync.bfly.b32 %r20, %r0, 1, 31, -1;\n$L_end:"),
    ("incomplete warp", "setp.gt.u32 %p20, %r0, 8; @%p20 bra $L_end;"
     "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r40, %r41, %r42, %r43}, {%r20, %r21},"
     "{%r22}, {%r23, %r24, %r25, %r26};\n$L_end:"),
    ("incomplete CTA", "setp.lt.u32 %p20, %r0, 32; @%p20 bra $L_end; bar.sync 0;\n$L_end:\n"
     "mov.b32 %r20, 0;"),
    ("async copy in flight", "cp.async.ca.shared.global [%r1], [%rd20], 4; cp.async.commit_group;"
     "ld.shared.b32 %r20, [%r1]; cp.async.wait_group 0;"),
    ("async copy in flight", "cp.async.ca.shared.global [%r1], [%rd20], 4; cp.async.commit_group;"
     "cp.async.wait_group 1; bar.sync 0; ld.shared.b32 %r20, [%r1];"),
    ("async copy in flight", "cp.async.ca.shared.global [%r1], [%rd20], 4;"),
    ("race between warps", "cp.async.ca.shared.global [%r1], [%rd20], 4; cp.async.commit_group;"
     "cp.async.wait_group 0; xor.b32 %r3, %r1, 128; ld.shared.b32 %r20, [%r3];"),
]  # fmt: skip


@pytest.mark.parametrize("body", CORRECT)
@pytest.mark.parametrize("order", ["lockstep", "ascending", "descending"])
def test_correct_accesses_are_not_reported(body: str, order: str) -> None:
    assert report(body, order=order).counts == {}


ONE_WORD = "or.b32 %r9, %r0, {}; {} st.shared.b32 [%r2], %r9; bar.sync 0;"  # by two warps
FLOAT32 = "mul.f32 %r9, %r9, 0f3F800000;"
HALF = "st.shared.b16 [%r2+128], 0;"
STORES = [  # bits, what precedes the store, the dtype of the kernel's argument, whether all are NaN
    (0x7FC00000, "", I32, True),  # float32
    (0x7FC00000, FLOAT32, torch.float16, True),
    (0x7FC00000, HALF, I32, True),  # not compared half by half
    (0x7E007E00, "", torch.float16, True),  # two halves
    (0x3C007E00, "", torch.float16, True),  # 1 and NaN
    (0x3F807FC0, "", torch.bfloat16, True),
    (0x7E007E00, "", I32, False),  # float32 from 4e37 on
    (0x3C007E00, FLOAT32, torch.float16, False),
    (0x7D007D00, "", torch.bfloat16, False),  # bfloat16 from 1e37 on
]


@pytest.mark.parametrize(("bits", "before", "dtype", "nan"), STORES)
@pytest.mark.parametrize("order", ["lockstep", "ascending"])
def test_nan_equals_nan_of_the_type_that_is_stored(bits, before, dtype, nan, order: str) -> None:
    x = torch.zeros(256 // dtype.itemsize, dtype=dtype)
    found = report(ONE_WORD.format(bits, before), x, order=order)
    wrong = {"lanes store different values", *["race between warps"] * (order != "lockstep")}
    assert set(found.counts) == (set() if nan else wrong)


@pytest.mark.parametrize(("bits", "dtype", "nan"), [
    (0x7E00, torch.float16, True), (0x7FC0, torch.bfloat16, True), (0x7E00, I32, False),
    (0x7D00, torch.bfloat16, False),
])  # fmt: skip
@pytest.mark.parametrize("space", ["shared.b16 [%r2]", "global.b16 [%rd0]"])
def test_nan_equals_nan_in_16_bits(bits: int, dtype, nan: bool, space: str) -> None:
    body = f"or.b32 %r9, %r0, {bits}; cvt.u16.u32 %rs20, %r9; st.{space}, %rs20;"
    found = report(body, torch.zeros(256 // dtype.itemsize, dtype=dtype), threads=32)
    assert set(found.counts) == (set() if nan else {"lanes store different values"})


@pytest.mark.parametrize(("kind", "body"), WRONG, ids=[body for _, body in WRONG])
def test_a_wrong_access_is_reported(kind: str, body: str) -> None:
    found = report(body)
    assert kind in found.counts, found
    assert "k line" in found.examples[kind] or "ends with it" in found.examples[kind]


def test_two_ctas_on_one_address() -> None:
    writes, reads = "st.global.b32 [%rd20], 1;", "ld.global.b32 %r20, [%rd20];"
    assert report(reads, grid=(2, 1, 1)).counts == {}
    assert set(report(writes, grid=(2, 1, 1)).counts) == {"race between CTAs"}
    one = "mov.u32 %r5, %ctaid.x; setp.eq.u32 %p20, %r5, 1; "
    later = f"{reads} {one} @%p20 {writes}"
    assert "race between CTAs" in report(later, grid=(2, 1, 1)).counts
    assert "race between CTAs" in report(later, grid=(99, 1, 1)).counts  # not side by side


def test_gaps_between_the_elements_of_a_view_are_out_of_bounds() -> None:
    wide = torch.zeros(32, 4, dtype=I32)
    assert report("ld.global.b32 %r20, [%rd20];", wide[:16]).counts == {}
    found = report("ld.global.b32 %r20, [%rd20];", wide[:, :2])
    assert found.counts == {"out of bounds": 32}
    assert found.examples["out of bounds"].endswith("between the elements of a view")
    last = "ld.global.b32 %r20, [%rd0+-4];"  # the element before the view, in its storage
    found = report(last, wide.view(-1)[4:])
    assert set(found.counts) == {"out of bounds"}
    assert found.examples["out of bounds"].endswith("in global memory")


def test_memory_that_is_stored_over_while_wgmma_reads_it() -> None:
    store = "".join(f"st.shared.b32 [%r1+{512 * i}], VALUE;" for i in range(4))
    descriptor = 8 << 16 | 8 << 32  # 128 bytes from piece to piece
    body = f"""{START} mov.b64 %rd30, {descriptor}; {store.replace("VALUE", "0")} bar.sync 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {{%r40, %r41, %r42, %r43}}, {{%r50, %r51, %r52, %r53}}, %rd30, 0, 1, 1, 0;
    wgmma.commit_group.sync.aligned; WAIT bar.sync 0; {store.replace("VALUE", "1")}"""
    wait, x = "wgmma.wait_group.sync.aligned 0;", torch.zeros(128, dtype=I32)
    options = dict(threads=128, shared=2048, arch="90a")
    assert run(body.replace("WAIT", wait), x, **options).counts == {}
    assert set(run(body.replace("WAIT", ""), x, **options).counts) == {"wgmma in flight"}


def test_arguments_have_to_fit_the_parameters() -> None:
    with pytest.raises(TypeError, match="arguments"):
        execute(program("", 2), (1, 1, 1), [("i32", 1)], 0, Options(), Report())
    with pytest.raises(TypeError, match="for i32"):
        execute(program("", 1), (1, 1, 1), [("i32", torch.zeros(1))], 0, Options(), Report())
    with pytest.raises(OverflowError):
        execute(program("", 1), (1, 1, 1), [("i64", 2**63)], 0, Options(), Report())


@pytest.mark.parametrize("order", [1, -1])
def test_views_that_overlap_or_touch_are_one_piece(order: int) -> None:
    """Also of a row that is expanded, and where a view begins within another one."""
    x = torch.zeros(8, 4)
    views = [x[0].expand(1000, 4), x[:1], x[:6], x[4:5]][::order]
    found = regions.Regions(views, 4)
    assert found.sizes.tolist() == [6 * 16]
    offsets = np.array([0, 60, 92, 96, 124])
    inside, _ = found.locate(x.data_ptr() + offsets, 4)
    assert inside.tolist() == [True, True, True, False, False]
    apart = regions.Regions([x[:, :2], x[1:2]][::order], 4)
    assert apart.sizes.tolist() == [8, 24] + [8] * 5  # rows 1 and 2 touch
    inside, _ = apart.locate(x.data_ptr() + np.array([4, 28]), 8)
    assert inside.tolist() == [False, True]
