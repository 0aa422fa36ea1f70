"""
Both ends of a token: the embedding of the last one, and the draw of the next.

    x = embed_tokens(tokens, counts, wte, wpe)
    sample_tokens(logits, tokens, counts, seed, temperature, top_k, top_p)

    tokens: (B, N) int64, a ring    counts: (B, K) int64    logits: (B, V)    wte: (V, C)

Draw        z = (logit - greatest) / temperature      mass = floor(2^40 exp(z)), an integer
            The tokens in order of their logits, equal ones by number; top-k and top-p keep a
            prefix. It ends at a logit t, of whose equals it takes n, and is found without a sort:
            32 halvings of the logits' range, each a count, or a sum of masses, of what is t or
            more. The token is the first whose masses up to it exceed u times the sum of all kept,
            u by 53 bits of Philox at (seed, text, number of the token), and all in integers.
Traffic     a row of logits, from L2 or nearer after the first pass.
Parallelism one program per text; without top-k and top-p four passes over its row.
Precision   exponentials in float32; sums of integers, which no order changes. A temperature below
            1/3e38 counts as that; logits are then apart or equal.
Limits      V up to 2^22, whose masses fit into 63 bits. No gradient.
Spec        irongpt_kernels/eager.py::embed_tokens, sample_tokens
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.eager import MASS_BITS, MAX_V, limits
from irongpt_kernels.runtime import checks, launch

MAX_BLOCK = 2048  # logits of a program at a time
UNITS = tl.constexpr(2.0**MASS_BITS)


@triton.jit
def _embed_kernel(
    tokens_ptr, counts_ptr, wte_ptr, wpe_ptr, x_ptr, N, C,
    tokens_stride, counts_stride, wte_stride, wpe_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    text, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = part * BLOCK + tl.arange(0, BLOCK)
    drawn = tl.load(counts_ptr + text * counts_stride)
    position = tl.load(counts_ptr + text * counts_stride + 1)
    last = (drawn + N - 1) % N  # drawn is 0 at first
    token = tl.maximum(tl.load(tokens_ptr + text * tokens_stride + last), 0)
    live = cols < C
    e = tl.load(wte_ptr + token * wte_stride + cols, mask=live, other=0.0).to(tl.float32)
    e += tl.load(wpe_ptr + position * wpe_stride + cols, mask=live, other=0.0).to(tl.float32)
    tl.store(x_ptr + text * C + cols, e, mask=live)


@triton.jit
def _keys(row_ptr, stride, start, V, BLOCK: tl.constexpr):
    """Logits, their order as integers, and which there are."""
    cols = start + tl.arange(0, BLOCK).to(tl.int64)
    live = cols < V
    x = tl.load(row_ptr + cols * stride, mask=live, other=float("-inf")).to(tl.float32)
    return x, _key(x), live


@triton.jit
def _key(x):
    """An integer of the order of x. -0 equals 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _mass(x, greatest, inverse):
    return (tl.exp((x - greatest) * inverse) * UNITS).to(tl.int64)


@triton.jit
def _mass_of_key(key, greatest, inverse):
    """`_mass` of the logit with that key."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32)
    return _mass(bits.to(tl.float32, bitcast=True), greatest, inverse)


@triton.jit
def _from(row_ptr, stride, V, greatest, inverse, least, MASSES: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens have a key of `least` or more, or with MASSES their mass."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, V, BLOCK):
        x, key, live = _keys(row_ptr, stride, start, V, BLOCK)
        each = _mass(x, greatest, inverse) if MASSES else tl.full((BLOCK,), 1, tl.int64)
        total += tl.where(live & (key >= least), each, 0)
    return tl.sum(total, 0)


@triton.jit
def _threshold(
    row_ptr, stride, V, greatest, inverse, low, wanted, MASSES: tl.constexpr, BLOCK: tl.constexpr
):
    """The greatest key from which on there is `wanted` or more. From `low` on there is."""
    high = tl.full((), 2**31 - 1, tl.int64)
    for _ in range(32):
        middle = low + (high - low + 1) // 2
        enough = _from(row_ptr, stride, V, greatest, inverse, middle, MASSES, BLOCK) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _uniform(seed, number, text):
    """`eager.uniform`, for one text."""
    zero = tl.zeros((1,), tl.uint32)
    low, high = zero + (number & 0xFFFFFFFF).to(tl.uint32), zero + (number >> 32).to(tl.uint32)
    w0, w1, _, _ = tl.philox(seed, low, high, zero + text.to(tl.uint32), zero + 2, 7)
    bits = (w0.to(tl.int64) << 21) | (w1 >> 11).to(tl.int64)
    return tl.sum(bits, 0).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _draw_kernel(
    logits_ptr, tokens_ptr, counts_ptr, seed_ptr, V, N,
    logits_stride_b, logits_stride_v, tokens_stride, counts_stride, inverse, top_k, top_p,
    K: tl.constexpr, GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """top_p: in units of 2^-53."""
    text = tl.program_id(0).to(tl.int64)
    row, stride = logits_ptr + text * logits_stride_b, logits_stride_v
    number = tl.load(counts_ptr + text * counts_stride)
    columns = tl.arange(0, BLOCK_K)
    counts_ptrs = counts_ptr + text * counts_stride + columns
    counts = tl.load(counts_ptrs, mask=columns < K, other=0)

    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    useless = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        x, _, live = _keys(row, stride, start, V, BLOCK)
        tops = tl.maximum(tops, x)
        useless += (live & ((tl.abs(x) < float("inf")) == 0)).to(tl.int32)
    greatest, useless = tl.max(tops, 0), tl.sum(useless, 0)

    # Kept is what has a key above t, and the first n of those that have t.
    t, n = tl.full((), -(2**31), tl.int64), tl.full((), 0, tl.int64)
    if GREEDY:
        t, n = _key(greatest), tl.full((), 1, tl.int64)
    elif TOP_K:
        t = _threshold(row, stride, V, greatest, inverse, t, top_k, False, BLOCK)
        n = top_k - _from(row, stride, V, greatest, inverse, t + 1, False, BLOCK)
    total = _from(row, stride, V, greatest, inverse, t + 1, True, BLOCK)
    if GREEDY or TOP_K:
        total += n * _mass_of_key(t, greatest, inverse)
    if TOP_P:
        share = total.to(tl.float64) * (top_p.to(tl.float64) * (1.0 / 9007199254740992.0))
        wanted = share.to(tl.int64)
        wanted = tl.maximum(wanted + (wanted.to(tl.float64) < share).to(tl.int64), 1)
        t = _threshold(row, stride, V, greatest, inverse, t, wanted, True, BLOCK)
        above = _from(row, stride, V, greatest, inverse, t + 1, True, BLOCK)
        one = _mass_of_key(t, greatest, inverse)
        n = (wanted - above + one - 1) // one
        total = above + n * one

    target = (_uniform(tl.load(seed_ptr), number, text) * total.to(tl.float64)).to(tl.int64)
    target = tl.minimum(target, total - 1)
    token, mass, equals = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), 0
    for start in range(0, V, BLOCK):
        x, key, live = _keys(row, stride, start, V, BLOCK)
        kept = live & (key > t)
        if GREEDY or TOP_K or TOP_P:
            equal = (live & (key == t)).to(tl.int32)
            kept |= (equal > 0) & (tl.cumsum(equal, 0) + equals <= n)
            equals += tl.sum(equal, 0)
        each = tl.where(kept, _mass(x, greatest, inverse), 0)
        token += tl.sum((live & (tl.cumsum(each, 0) + mass <= target)).to(tl.int64), 0)
        mass += tl.sum(each, 0)
    token = tl.where(useless > 0, -1, token)
    tl.store(tokens_ptr + text * tokens_stride + number % N, token)
    tl.store(counts_ptrs, counts + 1, mask=columns < K)


@torch.library.custom_op("irongpt::embed_tokens", mutates_args=())
def _embed(tokens: Tensor, counts: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    (B, N), C = tokens.shape, wte.shape[1]
    x = wte.new_empty(B, C)
    if x.numel():
        BLOCK = min(launch.block(C), 1024)
        strides = (t.stride(0) for t in (tokens, counts, wte, wpe))
        with launch.on(wte.device):
            _embed_kernel[(B, triton.cdiv(C, BLOCK))](
                tokens, counts, wte, wpe, x, N, C, *strides, BLOCK
            )
    return x


@_embed.register_fake
def _(tokens: Tensor, counts: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    return wte.new_empty(len(tokens), wte.shape[1])


@torch.library.custom_op("irongpt::sample_tokens", mutates_args=("tokens", "counts"))
def _draw(
    logits: Tensor, tokens: Tensor, counts: Tensor, seed: Tensor,
    temperature: float, top_k: int | None, top_p: float | None,
) -> None:  # fmt: skip
    B, V = logits.shape
    inverse, keep = limits(V, temperature, top_k)
    share = None if top_p is None or top_p >= 1 else top_p
    BLOCK = min(launch.block(V), MAX_BLOCK)
    if B:
        with launch.on(logits.device):
            _draw_kernel[(B,)](
                logits, tokens, counts, seed, V, tokens.shape[1],
                *logits.stride(), tokens.stride(0), counts.stride(0),
                inverse, keep, max(2, int((share or 0) * 2**53)),  # 1 would be a constant
                K=counts.shape[1], GREEDY=temperature == 0, TOP_K=keep < V,
                TOP_P=share is not None, BLOCK=BLOCK,
                BLOCK_K=triton.next_power_of_2(counts.shape[1]), num_warps=launch.warps(BLOCK),
            )  # fmt: skip


@_draw.register_fake
def _(logits, tokens, counts, seed, temperature, top_k, top_p) -> None:
    return None


def embed_tokens(tokens: Tensor, counts: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """See `eager.embed_tokens`. Raises TypeError and ValueError for what does not fit together."""
    checks.floating(wte=wte, wpe=wpe)
    _check(tokens, counts, wte=wte)
    checks.rank("wte", wte, 2)
    checks.shape("wpe", wpe, (wpe.shape[0], wte.shape[1]))
    if wpe.dtype != wte.dtype:
        raise ValueError(f"wpe must have the dtype of wte, {wte.dtype}, got {wpe.dtype}")
    return _embed(tokens, counts, wte.contiguous(), wpe.contiguous())


def sample_tokens(
    logits: Tensor,
    tokens: Tensor,
    counts: Tensor,
    seed: int | Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> None:
    """See `eager.sample_tokens`. Raises TypeError and ValueError for what does not fit together."""
    checks.floating(logits=logits)
    checks.rank("logits", logits, 2)
    _check(tokens, counts, logits=logits)
    checks.shape("tokens", tokens, (len(logits), tokens.shape[1]))
    checks.dropout(0.0, seed, logits=logits)
    if not 1 <= logits.shape[1] <= MAX_V:
        raise ValueError(f"logits must have 1 to {MAX_V:,} columns, got {logits.shape[1]:,}")
    _draw(
        logits, tokens, counts, launch.seed_tensor(seed, logits.device), temperature, top_k, top_p
    )


def _check(tokens: Tensor, counts: Tensor, **tensor: Tensor) -> None:
    checks.same_device(**tensor, tokens=tokens, counts=counts)
    for name, x in dict(tokens=tokens, counts=counts).items():
        checks.rank(name, x, 2)
        if x.dtype != torch.int64 or x.stride(1) != 1:
            raise TypeError(f"{name} must be int64 in rows, got {x.dtype}, strides {x.stride()}")
    checks.shape("counts", counts, (len(tokens), counts.shape[1]))
