"""Matrix instructions of the emulator against the fragment tables of the PTX ISA, lane by lane."""

import pytest
import torch
from irongpt_kernels.ptx.arithmetic import accumulate_exact, accumulate_like_hardware
from torch import Tensor

from tests.ptx.text import run

F16, BF16, I32 = torch.float16, torch.bfloat16, torch.int32
# A thread's number, and the addresses of its words in parameter %rd0 and in shared memory.
START = """mov.b32 %r1, global_smem; mul.lo.s32 %r2, %r0, 16; add.s32 %r3, %r1, %r2;
mul.wide.u32 %rd10, %r0, 16; add.s64 %rd11, %rd0, %rd10; add.s64 %rd12, %rd1, %rd10;"""
FILL = "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd11]; "
FILL += "st.shared.v4.b32 [%r3], {%r4, %r5, %r6, %r7}; bar.sync 0;"


def numbers(*size: int, dtype: torch.dtype = F16, seed: int = 0) -> Tensor:
    """Whole numbers, of which products and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, size, generator=generator).to(dtype)


def fragment(*blocks: Tensor) -> Tensor:
    """(32, 2 n) values: lane 4 g + t has of each 8 x 8 block columns 2 t and 2 t + 1 of row g."""
    return torch.cat([x.reshape(32, 2) for x in blocks], 1)


def fragment_of_a(A: Tensor) -> Tensor:
    """Of a matrix of 16 rows: register 0 has the rows g, register 1 the rows g + 8; the next two
    have the columns from 8 on."""
    return fragment(*(x for half in A.split(8, 1) for x in half.split(8)))


def listed(first: int, count: int) -> str:
    """The names of registers in braces."""
    return "{" + ", ".join(f"%r{i}" for i in range(first, first + count)) + "}"


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("k", [8, 16])
def test_mma(k: int, dtype: torch.dtype) -> None:
    A, B = numbers(16, k, dtype=dtype), numbers(8, k, dtype=dtype, seed=1)
    C = numbers(16, 8, seed=2).float()
    parts = [
        x.view(I32) for x in (fragment_of_a(A), fragment(*B.split(8, 1)), fragment(*C.split(8)))
    ]
    x, out = torch.cat(parts, 1), torch.zeros(32, 4)
    na, nb, n = k // 4, k // 8, x.shape[1]
    loads = "".join(f"ld.global.b32 %r{20 + i}, [%rd11+{4 * i}];" for i in range(n))
    operands = f"{listed(20, na)}, {listed(20 + na, nb)}, {listed(20 + na + nb, 4)}"
    name = "f16" if dtype == F16 else "bf16"
    body = f"""mul.wide.u32 %rd10, %r0, {4 * n}; add.s64 %rd11, %rd0, %rd10; {loads}
    mma.sync.aligned.m16n8k{k}.row.col.f32.{name}.{name}.f32 {listed(40, 4)}, {operands};
    mul.wide.u32 %rd10, %r0, 16; add.s64 %rd12, %rd1, %rd10;
    st.global.v4.b32 [%rd12], {listed(40, 4)};"""
    assert run(body, x, out, arch="80").counts == {}
    want = A.float() @ B.float().T + C
    assert torch.equal(out, fragment(*want.split(8)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, transposed: bool) -> None:
    """Lane 8 i + r has the address of row r of matrix i; lane 4 g + t gets row g, columns 2 t."""
    memory, out = numbers(32, 8), torch.full((32, 8), -9.0, dtype=F16)
    trans = ".trans" if transposed else ""
    body = f"""{START} {FILL}
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {listed(20, count)}, [%r3];"""
    body += "".join(f"st.global.b32 [%rd12+{4 * i}], %r{20 + i};" for i in range(count))
    assert run(body, memory, out, shared=512).counts == {}
    matrices = [x.T if transposed else x for x in memory.split(8)][:count]
    assert torch.equal(out[:, : 2 * count], fragment(*matrices))
    assert (out[:, 2 * count :] == -9).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(transposed: bool) -> None:
    values, out = numbers(32, 8), torch.zeros(32, 8, dtype=F16)
    trans = ".trans" if transposed else ""
    body = f"""{START} ld.global.v4.b32 {listed(20, 4)}, [%rd11];
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3], {listed(20, 4)};
    bar.sync 0; ld.shared.v4.b32 {listed(24, 4)}, [%r3];
    st.global.v4.b32 [%rd12], {listed(24, 4)};"""
    assert run(body, values, out, shared=512, arch="90").counts == {}
    assert torch.equal(fragment(*(x.T if transposed else x for x in out.split(8))), values)


def test_warps_may_store_copies_of_one_matrix() -> None:
    """As of rows that a layout replicates; other values are reported."""
    store = """and.b32 %r5, %r0, 31; mul.lo.s32 %r6, %r5, 16; add.s32 %r7, %r1, %r6;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r7], {VALUE};"""
    out = torch.zeros(32, 8, dtype=F16)
    same, other = (f"{START} {store.replace('VALUE', x)}" for x in ("%r5", "%r0"))
    how = dict(threads=64, shared=512, arch="90")
    assert run(same, out, out, **how).counts == {}
    assert run(other, out, out, **how).counts == {"lanes store different values": 32}


def test_async_copies_arrive_when_they_are_waited_for() -> None:
    memory, out = numbers(32, 8), torch.zeros(32, 8, dtype=F16)
    body = f"""{START} mov.b32 %r9, 16; setp.gt.u32 %p20, %r0, 15; @%p20 mov.b32 %r9, 0;
    cp.async.cg.shared.global [%r3], [%rd11], 16, %r9; cp.async.commit_group;
    cp.async.wait_group 0; bar.sync 0; ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
    st.global.v4.b32 [%rd12], {{%r4, %r5, %r6, %r7}};"""
    assert run(body, memory, out, shared=512, arch="80").counts == {}
    memory[16:] = 0  # a source size of 0 fills with zeros
    assert torch.equal(out, memory)


def test_shared_memory_holds_bytes_of_any_width() -> None:
    memory, out = numbers(32, 8), torch.zeros(32, 8, dtype=F16)
    body = f"""{START} {FILL} xor.b32 %r8, %r3, 32; ld.shared.b64 %rd20, [%r8];
    ld.shared.u16 %rs20, [%r8+14]; ld.shared.s8 %r20, [%r8+1];
    st.global.b64 [%rd12], %rd20; st.global.b16 [%rd12+8], %rs20; st.global.b32 [%rd12+12], %r20;"""
    assert run(body, memory, out, shared=512).counts == {}
    other = memory.view(16, 2, 8).view(8, 2, 2, 8).flip(1).reshape(32, 8)  # lanes i ^ 2
    assert torch.equal(out[:, :4], other[:, :4])
    assert torch.equal(out[:, 4], other[:, 7])
    assert torch.equal(out.view(I32)[:, 3], other.view(torch.int8)[:, 1].to(I32))


def descriptor(start: int, lead: int, stride: int, mode: int) -> int:
    return start >> 4 | (lead >> 4) << 16 | (stride >> 4) << 32 | mode << 62


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("registers", [False, True])
def test_wgmma(swizzle: int, registers: bool) -> None:
    """64 x 16 by 16 x 8, both with k along the rows in shared memory. In a row of 16-byte pieces
    (8 values of k), piece c of row r is found at piece c ^ (r % 8), for a swizzle of 128 bytes."""
    A, B = numbers(64, 16), numbers(8, 16, seed=1)
    memory = torch.zeros(128 * 128, dtype=F16)  # a piece (8 values) for each of 2,048 addresses
    width = swizzle or 16

    def put(x: Tensor, start: int) -> tuple[int, int, int]:
        """Stores a matrix; returns the fields of its descriptor."""
        lead = 128 * len(x) // 8
        for r, row in enumerate(x):
            for c in range(2):
                byte = start + r * width + c * (16 if swizzle else lead)
                if swizzle:
                    byte ^= ((byte >> 7) & (swizzle // 16 - 1)) << 4
                memory[byte // 2 : byte // 2 + 8] = row[8 * c : 8 * c + 8]
        return start, lead, 8 * width

    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    a, b = (descriptor(*put(x, at), mode) for x, at in ((A, 0), (B, 16384)))
    copies = "".join(
        f"ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd11+{2048 * i}];"
        f"st.shared.v4.b32 [%r3+{2048 * i}], {{%r4, %r5, %r6, %r7}};"
        for i in range(16)
    )
    of_warps = torch.cat([fragment_of_a(x) for x in A.split(16)])
    operand = listed(50, 4) if registers else "%rd20"
    tail = "1, 1, 1, 0" if registers else "1, 1, 1, 0, 0"
    body = f"""{START} {copies} add.s64 %rd13, %rd2, %rd10;
    ld.global.v4.b32 {listed(50, 4)}, [%rd13];
    mov.b32 %r40, 0f3F800000; mov.b32 %r41, 0f3F800000; mov.b32 %r42, 0; mov.b32 %r43, 0;
    mov.b64 %rd20, {a}; mov.b64 %rd21, {b}; fence.proxy.async.shared::cta; bar.sync 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {listed(40, 4)}, {operand}, %rd21, {tail};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    st.global.v4.b32 [%rd12], {listed(40, 4)};"""
    out = torch.zeros(128, 4)
    report = run(body, memory, out, of_warps, threads=128, shared=32768, arch="90a")
    assert report.counts == {}
    want = A.float() @ B.float().T
    wanted = torch.cat([fragment(*x.split(8)) for x in want.split(16)])
    assert torch.equal(out, wanted + torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_sums_of_tensor_cores() -> None:
    """2^24 + 1 + 1 is exact once, and 2^24 where each 1 is truncated: blocks of one product."""
    A = torch.tensor([[2.0**12, 1.0, 1.0, 0.0]], dtype=torch.float64).numpy()
    B = torch.tensor([[2.0**12, 1.0, 1.0, 0.0]], dtype=torch.float64).numpy()
    zero = torch.zeros(1, 1).numpy()
    assert accumulate_exact(zero, A, B)[0, 0] == 2.0**24 + 2
    assert accumulate_like_hardware(4, 0)(zero, A, B)[0, 0] == 2.0**24
    assert accumulate_like_hardware(4, 1)(zero, A, B)[0, 0] == 2.0**24 + 2
    assert accumulate_like_hardware(1, 0)(zero, -A, B)[0, 0] == -(2.0**24)
