"""Each PTX instruction of the emulator against values that were computed by hand."""

import math
from typing import Any

import pytest
import torch
from irongpt_kernels.ptx.operands import Unsupported
from torch import Tensor

from tests.ptx.text import compute, lanes, run

I16, I32, I64 = torch.int16, torch.int32, torch.int64
F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
NAN, INF = math.nan, math.inf
TINY = 2.0**-130  # subnormal in float32


def halves(low: float, high: float, dtype: torch.dtype = F16) -> int:
    """A register with two 16-bit floats."""
    return int(torch.tensor([low, high], dtype=dtype).view(I32))


PAIR, OTHER = halves(1.0, 2.0), halves(0.5, -4.0)

Row = tuple[str, torch.dtype, list[Any], torch.dtype, list[list[Any]]]
ROWS: list[Row] = [  # instruction, dtype and values of the result, dtype and values of operands
    # Integers wrap around; hi and wide are the upper half and all of a product.
    ("add.s32 $d, $a, $b;", I32, [3, -(2**31)], I32, [[1, 2**31 - 1], [2, 1]]),
    ("sub.s64 $d, $a, $b;", I64, [-1, 2**40], I64, [[1, 2**40 + 7], [2, 7]]),
    ("add.s32 $d, $a, -5;", I32, [2], I32, [[7]]),
    ("mul.lo.s32 $d, $a, $b;", I32, [-6, 0], I32, [[2, 2**16], [-3, 2**16]]),
    ("mul.hi.s32 $d, $a, $b;", I32, [-1, 1], I32, [[2, 2**16], [-3, 2**16]]),
    ("mul.hi.u32 $d, $a, $b;", I32, [1, 2], I32, [[2, -1], [-3, 3]]),
    ("mul.wide.s32 $d, $a, $b;", I64, [-6, 2**32], I32, [[2, 2**16], [-3, 2**16]]),
    ("mul.wide.u32 $d, $a, $b;", I64, [2**33 - 2], I32, [[2], [-1]]),
    ("mul.wide.s16 $d, $a, $b;", I32, [-(2**15) * 3], I16, [[-(2**15)], [3]]),
    ("mad.lo.s32 $d, $a, $b, $c;", I32, [11], I32, [[2], [3], [5]]),
    ("mad.wide.u32 $d, $a, $b, 7;", I64, [2**33 + 5], I32, [[2], [-1]]),
    ("div.s32 $d, $a, $b;", I32, [-3, 3, -3], I32, [[7, -7, -7], [-2, -2, 2]]),
    ("rem.s32 $d, $a, $b;", I32, [1, -1, -1], I32, [[7, -7, -7], [-2, -2, 2]]),
    ("div.u32 $d, $a, $b;", I32, [2**31 - 1], I32, [[-1], [2]]),
    ("rem.u32 $d, $a, $b;", I32, [3], I32, [[-1], [4]]),
    ("abs.s32 $d, $a;", I32, [5, 5], I32, [[5, -5]]),
    ("neg.s32 $d, $a;", I32, [-5], I32, [[5]]),
    ("min.s32 $d, $a, $b;", I32, [-1], I32, [[-1], [1]]),
    ("min.u32 $d, $a, $b;", I32, [1], I32, [[-1], [1]]),
    ("max.s64 $d, $a, $b;", I64, [1], I64, [[-1], [1]]),
    # Bits.
    ("and.b32 $d, $a, $b;", I32, [0b1000], I32, [[0b1100], [0b1010]]),
    ("or.b32 $d, $a, $b;", I32, [0b1110], I32, [[0b1100], [0b1010]]),
    ("xor.b32 $d, $a, $b;", I32, [0b0110], I32, [[0b1100], [0b1010]]),
    ("not.b32 $d, $a;", I32, [-1], I32, [[0]]),
    ("shl.b32 $d, $a, 4;", I32, [16, -16], I32, [[1, -1]]),
    ("shl.b32 $d, $a, $b;", I32, [4, 0, 0], I32, [[1, 1, 1], [2, 32, 99]]),
    ("shr.s32 $d, $a, 4;", I32, [1, -1], I32, [[16, -16]]),
    ("shr.s32 $d, $a, $b;", I32, [-1, 0], I32, [[-16, 16], [40, 40]]),
    ("shr.u32 $d, $a, 28;", I32, [15], I32, [[-1]]),
    ("shr.u32 $d, $a, 32;", I32, [0], I32, [[-1]]),
    ("bfe.u32 $d, $a, 4, 8;", I32, [0xAB], I32, [[0x7ABC]]),
    ("bfe.s32 $d, $a, 4, 8;", I32, [-0x55], I32, [[0x7ABC]]),
    ("bfe.u32 $d, $a, 28, 8;", I32, [7], I32, [[0x7FFFFFFF]]),
    ("prmt.b32 $d, $a, $b, 0x5410;", I32, [0x0605_0201], I32, [[0x04030201], [0x08070605]]),
    ("prmt.b32 $d, $a, 0, 0x8888;", I32, [-1, 0], I32, [[0x80, 0x7F]]),
    ("popc.b32 $d, $a;", I32, [32, 1], I32, [[-1, 4]]),
    # float32. min and max ignore NaN unless .NaN is given; -0 is less than 0.
    ("add.f32 $d, $a, $b;", F32, [3.75, 1.0], F32, [[1.5, 1.0], [2.25, 2.0**-25]]),
    ("add.ftz.f32 $d, $a, $b;", F32, [0.0], F32, [[TINY], [TINY]]),
    ("sub.f32 $d, $a, 0f3F800000;", F32, [1.5], F32, [[2.5]]),
    ("mul.f32 $d, $a, $b;", F32, [3.0, INF], F32, [[1.5, 1e30], [2.0, 1e30]]),
    ("fma.rn.f32 $d, $a, $b, $c;", F32, [2.0**-24], F32, [[1 + 2.0**-12], [1 + 2.0**-12],
     [-(1 + 2.0**-11)]]),
    ("div.rn.f32 $d, $a, $b;", F32, [0.5, INF], F32, [[1.0, 1.0], [2.0, 0.0]]),
    ("div.full.f32 $d, $a, $b;", F32, [0.5], F32, [[1.0], [2.0]]),
    ("ex2.approx.ftz.f32 $d, $a;", F32, [8.0, 0.0, 1.0], F32, [[3.0, -INF, TINY]]),
    ("rsqrt.approx.f32 $d, $a;", F32, [0.5, INF], F32, [[4.0, 0.0]]),
    ("sqrt.rn.f32 $d, $a;", F32, [3.0], F32, [[9.0]]),
    ("abs.f32 $d, $a;", F32, [1.5], F32, [[-1.5]]),
    ("neg.f32 $d, $a;", F32, [1.5], F32, [[-1.5]]),
    ("max.f32 $d, $a, $b;", F32, [2.0, 1.0, 0.0], F32, [[1.0, 1.0, -0.0], [2.0, NAN, 0.0]]),
    ("max.NaN.f32 $d, $a, $b;", F32, [2.0, NAN], F32, [[1.0, 1.0], [2.0, NAN]]),
    ("min.f32 $d, $a, $b;", F32, [1.0, 1.0, -0.0], F32, [[1.0, 1.0, -0.0], [2.0, NAN, 0.0]]),
    # 16-bit floats are rounded once.
    ("add.rn.f16 $d, $a, $b;", F16, [3.75, 2048.0], F16, [[1.5, 2048.0], [2.25, 1.0]]),
    ("mul.rn.bf16 $d, $a, $b;", BF16, [3.0], BF16, [[1.5], [2.0]]),
    ("fma.rn.f16 $d, $a, $b, $c;", F16, [7.0], F16, [[1.5], [2.0], [4.0]]),
    ("fma.rn.bf16 $d, $a, $b, $c;", BF16, [7.0], BF16, [[1.5], [2.0], [4.0]]),
    ("max.f16 $d, $a, $b;", F16, [2.25], F16, [[1.5], [2.25]]),
    # Two of them in a register.
    ("add.rn.f16x2 $d, $a, $b;", I32, [halves(1.5, -2.0)], I32, [[PAIR], [OTHER]]),
    ("mul.rn.f16x2 $d, $a, $b;", I32, [halves(0.5, -8.0)], I32, [[PAIR], [OTHER]]),
    ("fma.rn.f16x2 $d, $a, $b, $a;", I32, [halves(1.5, -6.0)], I32, [[PAIR], [OTHER]]),
    ("setp.gt.f16x2 %p20|%p21, $a, $b; selp.b32 $d, 1, 0, %p21;", I32, [1], I32, [[PAIR], [OTHER]]),
    ("cvt.rn.f16x2.f32 $d, $a, $b;", I32, [halves(-2.0, 1.5)], F32, [[1.5], [-2.0]]),
    ("cvt.rn.bf16x2.f32 $d, $a, $b;", I32, [halves(-2.0, 1.5, BF16)], F32, [[1.5], [-2.0]]),
    # Conversions.
    ("cvt.f32.f16 $d, $a;", F32, [1.5], F16, [[1.5]]),
    ("cvt.rn.f16.f32 $d, $a;", F16, [1.0, INF], F32, [[1 + 2.0**-12, 1e6]]),
    ("cvt.f32.bf16 $d, $a;", F32, [1.5], BF16, [[1.5]]),
    ("cvt.rn.bf16.f32 $d, $a;", BF16, [1.0, 1 + 2.0**-6], F32, [[1 + 2.0**-8, 1 + 3 * 2.0**-8]]),
    ("cvt.rzi.s32.f32 $d, $a;", I32, [-1, 2**31 - 1, 0], F32, [[-1.9, 1e20, NAN]]),
    ("cvt.rni.s32.f32 $d, $a;", I32, [2, 4], F32, [[2.5, 3.5]]),
    ("cvt.rzi.u32.f32 $d, $a;", I32, [0, 3], F32, [[-1.9, 3.9]]),
    ("cvt.rzi.f32.f32 $d, $a;", F32, [-1.0], F32, [[-1.9]]),
    ("cvt.rmi.f32.f32 $d, $a;", F32, [-2.0], F32, [[-1.9]]),
    ("cvt.rpi.f32.f32 $d, $a;", F32, [-1.0], F32, [[-1.9]]),
    ("cvt.rn.f32.s32 $d, $a;", F32, [-3.0, 2.0**24], I32, [[-3, 2**24 + 1]]),
    ("cvt.rn.f32.u32 $d, $a;", F32, [2.0**32], I32, [[-1]]),
    ("cvt.s64.s32 $d, $a;", I64, [-3], I32, [[-3]]),
    ("cvt.u64.u32 $d, $a;", I64, [2**32 - 3], I32, [[-3]]),
    ("cvt.u32.u64 $d, $a;", I32, [5], I64, [[2**32 + 5]]),
    ("cvt.u16.u32 $d, $a;", I16, [5], I32, [[0x10005]]),
    # Comparisons: with NaN only ne by u, and those that end in u, are true.
    *(
        (f"setp.{what}.f32 %p20, $a, $b; selp.b32 $d, 1, 0, %p20;", I32, found, F32,
         [[1.0, 2.0, NAN], [2.0, 2.0, 1.0]])
        for what, found in [
            ("lt", [1, 0, 0]), ("le", [1, 1, 0]), ("eq", [0, 1, 0]), ("ne", [1, 0, 0]),
            ("gt", [0, 0, 0]), ("ge", [0, 1, 0]), ("ltu", [1, 0, 1]), ("neu", [1, 0, 1]),
            ("geu", [0, 1, 1]), ("num", [1, 1, 0]), ("nan", [0, 0, 1]),
        ]
    ),
    ("setp.lt.s32 %p20, $a, $b; selp.b32 $d, 7, 8, %p20;", I32, [7], I32, [[-1], [1]]),
    ("setp.lt.u32 %p20, $a, $b; selp.b32 $d, 7, 8, %p20;", I32, [8], I32, [[-1], [1]]),
    ("setp.gt.s32 %p20|%p21, $a, 0; selp.b32 $d, 1, 0, %p21;", I32, [0, 1], I32, [[1, -1]]),
    ("setp.lt.bf16 %p20, $a, $b; selp.b16 $d, 0x3F80, 0, %p20;", BF16, [1.0], BF16, [[1.5], [2.0]]),
    # Moves, guards.
    ("mov.b32 $d, 0f40000000;", F32, [2.0], F32, [[0.0]]),
    ("mov.b64 {%r40, %r41}, $a; mov.b64 $d, {%r41, %r40};", I64, [2**32 + 2], I64, [[2**33 + 1]]),
    ("mov.b32 {%rs40, %rs41}, $a; mov.b32 $d, {%rs41, %rs40};", I32, [0x10002], I32, [[0x20001]]),
    ("mov.b32 $d, 4; setp.gt.s32 %p20, $a, 0; @%p20 mov.b32 $d, 5;", I32, [5, 4], I32, [[1, -1]]),
    ("mov.b32 $d, 4; setp.gt.s32 %p20, $a, 0; @!%p20 mov.b32 $d, 5;", I32, [4, 5], I32, [[1, -1]]),
    ("selp.f32 $d, $a, $b, 1;", F32, [1.0], F32, [[1.0], [2.0]]),
    # Other lanes. The third operand of a shuffle gives its segments and the last lane.
    *(
        (f"shfl.sync.{how}, -1;", I32, [10 + i for i in found], I32, [[10 + i for i in range(32)]])
        for how, found in [
            ("bfly.b32 $d, $a, 3, 31", [i ^ 3 for i in range(32)]),
            ("up.b32 $d, $a, 2, 0", [0, 1, *range(30)]),
            ("down.b32 $d, $a, 2, 31", [*range(2, 32), 30, 31]),
            ("idx.b32 $d, $a, 5, 31", [5]),
            ("idx.b32 $d, $a, 1, 0x181F", [i // 8 * 8 + 1 for i in range(32)]),  # segments of 8
            ("down.b32 $d, $a, 6, 0x181F", [i + 6 if i % 8 < 2 else i for i in range(32)]),
        ]
    ),
    ("shfl.sync.down.b32 %r40|%p20, $a, 2, 31, -1; selp.b32 $d, 1, 0, %p20;", I32,
     [1] * 30 + [0] * 2, I32, [[7]]),
    *(
        (f"redux.sync.{how} $d, $a, -1;", I32, [found], I32, [[*range(32)]])
        for how, found in [
            ("add.u32", 496), ("max.s32", 31), ("min.s32", 0), ("or.b32", 31), ("xor.b32", 0)
        ]
    ),
]  # fmt: skip


def bits(x: Tensor) -> Tensor:
    return x.view({2: I16, 4: I32, 8: I64}[x.itemsize])


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_an_instruction_computes_the_value(row: Row) -> None:
    op, dtype, wanted, operand_dtype, operands = row
    found = compute(op, dtype, *(lanes(x, operand_dtype) for x in operands))
    want = lanes(wanted, dtype)
    if dtype.is_floating_point:
        assert torch.equal(found.isnan(), want.isnan())
        found, want = (torch.where(x.isnan(), torch.zeros_like(x), x) for x in (found, want))
    assert torch.equal(bits(found), bits(want)), (found, want)


def ulp(y: Tensor) -> Tensor:
    return 2.0 ** (y.abs().log2().floor() - 23)


@pytest.mark.parametrize(
    ("op", "true", "bound"),  # as the PTX ISA states it: in units in the last place, or relative
    [
        ("ex2.approx.f32 $d, $a;", torch.exp2, lambda x, y: 2 * ulp(y)),
        ("ex2.approx.ftz.f32 $d, $a;", torch.exp2, lambda x, y: 2 * ulp(y)),
        ("div.full.f32 $d, 0f40400000, $a;", lambda x: 3 / x, lambda x, y: 2 * ulp(y)),
        ("sqrt.approx.f32 $d, $a;", torch.sqrt, lambda x, y: 2.0**-23 * y),
        ("rsqrt.approx.ftz.f32 $d, $a;", torch.rsqrt, lambda x, y: 2.0**-22.9 * y),
    ],
)
def test_noise_is_what_the_isa_allows(op: str, true: Any, bound: Any) -> None:
    x = torch.linspace(0.3, 3.1, 32)
    exact = true(x.double())
    assert ((compute(op, F32, x) - exact).abs() <= ulp(exact) / 2).all()
    share = (compute(op, F32, x, noise=1.0) - exact) / bound(x, exact)
    assert share.abs().max() <= 1
    assert share.max() > 0.5
    assert share.min() < -0.5


def test_what_is_rounded_correctly_has_no_noise() -> None:
    x = torch.linspace(0.3, 3.1, 32)
    quotient, root = (3 / x.double()).float(), x.double().sqrt().float()  # torch's have errors
    assert torch.equal(compute("div.rn.f32 $d, 0f40400000, $a;", F32, x, noise=1.0), quotient)
    assert torch.equal(compute("sqrt.rn.f32 $d, $a;", F32, x, noise=1.0), root)
    whole = torch.arange(-16.0, 16.0)
    assert torch.equal(compute("ex2.approx.f32 $d, $a;", F32, whole, noise=1.0), whole.exp2())


@pytest.mark.parametrize("order", ["lockstep", "ascending", "descending"])
def test_threads_part_and_meet_again(order: str) -> None:
    out = torch.zeros(64, dtype=I32)
    body = """
    mov.b32 %r20, 0; mov.b32 %r21, 0;
    $L_loop:
    add.s32 %r20, %r20, 1; add.s32 %r21, %r21, %r20;
    setp.lt.u32 %p20, %r20, %r0; @%p20 bra $L_loop;
    mul.wide.u32 %rd20, %r0, 4; add.s64 %rd20, %rd0, %rd20;
    setp.eq.u32 %p20, %r0, 9; @%p20 ret;
    st.global.b32 [%rd20], %r21;"""
    assert run(body, out, threads=64, order=order).counts == {}
    want = [max(1, i) * (max(1, i) + 1) // 2 for i in range(64)]
    want[9] = 0
    assert out.tolist() == want


def test_special_registers_and_several_ctas() -> None:
    out = torch.zeros(2 * 3 * 64, dtype=I32)
    body = """mov.u32 %r20, %ctaid.x; mov.u32 %r21, %ctaid.y; mov.u32 %r22, %nctaid.x;
    mad.lo.s32 %r20, %r21, %r22, %r20; mov.u32 %r23, %ntid.x; mad.lo.s32 %r20, %r20, %r23, %r0;
    mov.u32 %r24, %laneid; mul.wide.u32 %rd20, %r20, 4; add.s64 %rd20, %rd0, %rd20;
    st.global.b32 [%rd20], %r24;"""
    assert run(body, out, threads=64, grid=(2, 3, 1)).counts == {}
    assert out.tolist() == [i % 32 for i in range(len(out))]


@pytest.mark.parametrize(("bits", "register"), [(32, "%r20"), (64, "%rd22")])
def test_a_parameter_at_an_address_in_a_register(bits: int, register: str) -> None:
    unused, out = torch.zeros(1, dtype=I32), torch.zeros(32, dtype=I32)
    body = f"""mov.b{bits} {register}, k_param_0; ld.param.b64 %rd20, [{register}+8];
    mul.wide.u32 %rd21, %r0, 4; add.s64 %rd20, %rd20, %rd21; st.global.b32 [%rd20], %r0;"""
    assert run(body, unused, out).counts == {}
    assert out.tolist() == list(range(32))


@pytest.mark.parametrize(
    "op",
    [
        "brev.b32 %r20, %r0;",
        "add.sat.s32 %r20, %r0, 1;",
        "atom.global.add.u32 %r1, [%rd0], 1;",
        "setp.lt.f16 %p20|%p21, %rs0, %rs1;",  # has one result
    ],
)
def test_an_unknown_instruction_is_not_skipped(op: str) -> None:
    with pytest.raises(Unsupported):
        run(op, torch.zeros(1))
