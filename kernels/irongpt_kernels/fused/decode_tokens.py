"""Both ends of one decoding step: the embedding of the last token, and the sampling of the next.

    x = embed_tokens(tokens, counts, wte, wpe)
    sample_tokens(logits, tokens, counts, seed, temperature, top_k, top_p)

    tokens: (B, N) int64, a ring buffer    logits: (B, V)    wte: (V, C)    wpe: (context, C)
    x: (B, C)    counts: int64, B rows: column 0 is the number of tokens so far, column 1 (for
    embed_tokens) the position of the last; sample_tokens increments every column

Sampling    z = (logit - max logit) / temperature      mass = floor(2^40 exp(z)), an integer
            Top-k and top-p keep a prefix of the tokens sorted by descending logit (equal ones by
            token id). The kernel finds it without sorting, as a threshold t and a count n: it keeps
            all tokens with a logit above t, and the first n of those equal to t. 32 bisection steps
            find t exactly, because a float32 is compared as a 32-bit integer of the same order
            (`_key`). Each step tries a value: it counts the tokens whose logit is at least that
            (for top-k), or sums their masses (for top-p). The sampled token is the first at which
            the running sum of kept masses, in order of token id, exceeds u times their total. u is
            uniform in [0, 1) with 53 bits, by Philox from the seed, the sequence and the number of
            its tokens.
Traffic     Each pass reads a row of logits. Passes after the first find it in a cache.
Parallelism one program per sequence. Without top-k and top-p it passes over its row three times.
Precision   Exponentials are in float32. Masses are integers, so their sum does not depend on the
            order. A temperature above 0 and below 1 / (3 x 10^38) is replaced by that number, which
            already leaves all mass to the tokens with the largest logit.
Limits      V is at most 2^22, so that the sum of masses fits into 63 bits. x is NaN if a token
            is V or above or a position is outside [0, context): an error would make the host wait.
            No gradient.
Spec        irongpt_kernels/eager.py::embed_tokens, sample_tokens
"""

import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.eager import MASS_BITS, inverse_temperature_and_k
from irongpt_kernels.fused.philox import ROUNDS
from irongpt_kernels.runtime import checks, launch
from irongpt_kernels.runtime.custom_op import custom_op

# Logits that a program holds at a time. The interpreter's time depends on the number of blocks.
MAX_BLOCK = 16_384 if launch.INTERPRETED else 2048
UNITS = tl.constexpr(2.0**MASS_BITS)


@triton.jit
def _embed_kernel(
    tokens_ptr, counts_ptr, wte_ptr, wpe_ptr, x_ptr, N, C, V, context,
    tokens_stride, counts_stride, wte_stride, wpe_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, col_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = col_tile * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts_ptr + sequence * counts_stride)
    position = tl.load(counts_ptr + sequence * counts_stride + 1)
    last = (count + N - 1) % N  # count can be 0
    token = tl.maximum(tl.load(tokens_ptr + sequence * tokens_stride + last), 0)
    known = (token < V) & (position >= 0) & (position < context)
    mask = cols < C
    e = tl.load(wte_ptr + token * wte_stride + cols, mask=mask & known, other=0.0).to(tl.float32)
    wpe_ptrs = wpe_ptr + position * wpe_stride + cols
    e += tl.load(wpe_ptrs, mask=mask & known, other=0.0).to(tl.float32)
    tl.store(x_ptr + sequence * C + cols, tl.where(known, e, float("nan")), mask=mask)


@triton.jit
def _load_block(row_ptr, stride, start, V, BLOCK: tl.constexpr):
    """Returns a block of logits, their `_key`s and the mask of valid columns."""
    cols = start + tl.arange(0, BLOCK).to(tl.int64)
    valid = cols < V
    x = tl.load(row_ptr + cols * stride, mask=valid, other=float("-inf")).to(tl.float32)
    return x, _key(x), valid


@triton.jit
def _key(x):
    """An integer that orders like the float x, with -0 equal to 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _mass(x, max_logit, inverse):
    """The integer mass of a logit. inverse: 1 / temperature."""
    return (tl.exp((x - max_logit) * inverse) * UNITS).to(tl.int64)


@triton.jit
def _mass_of_key(key, max_logit, inverse):
    """`_mass` of the logit whose `_key` is given."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32)
    return _mass(bits.to(tl.float32, bitcast=True), max_logit, inverse)


@triton.jit
def _at_least(
    row_ptr, stride, V, max_logit, inverse, least, MASSES: tl.constexpr, BLOCK: tl.constexpr
):
    """The number of tokens with a key of at least `least`, or with MASSES their total mass."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, V, BLOCK):
        x, key, valid = _load_block(row_ptr, stride, start, V, BLOCK)
        each = _mass(x, max_logit, inverse) if MASSES else tl.full((BLOCK,), 1, tl.int64)
        total += tl.where(valid & (key >= least), each, 0)
    return tl.sum(total, 0)


@triton.jit
def _threshold(
    row_ptr, stride, V, max_logit, inverse, low, wanted, MASSES: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key, `low` or above, for which `_at_least` is still `wanted` or more."""
    high = tl.full((), 2**31 - 1, tl.int64)
    for _ in range(32):
        middle = low + (high - low + 1) // 2
        enough = _at_least(row_ptr, stride, V, max_logit, inverse, middle, MASSES, BLOCK) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _uniform(seed, number, sequence):
    """`eager.uniform` for one sequence."""
    zero = tl.zeros((1,), tl.uint32)
    low, high = zero + (number & 0xFFFFFFFF).to(tl.uint32), zero + (number >> 32).to(tl.uint32)
    w0, w1, _, _ = tl.philox(seed, low, high, zero + sequence.to(tl.uint32), zero + 2, ROUNDS)
    bits = (w0.to(tl.int64) << 21) | (w1 >> 11).to(tl.int64)
    return tl.sum(bits, 0).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _sample_kernel(
    logits_ptr, tokens_ptr, counts_ptr, seed_ptr, V, N,
    logits_strides, tokens_stride, counts_stride, inverse, top_k, top_p,
    K: tl.constexpr, GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """inverse: 1 / temperature. top_k: the number of tokens to keep. top_p: in units of 2^-53.
    K: the number of columns of counts. GREEDY: take the most likely token. TOP_K, TOP_P: whether
    top_k and top_p apply."""
    sequence = tl.program_id(0).to(tl.int64)
    row, stride = logits_ptr + sequence * logits_strides[0], logits_strides[1]
    number = tl.load(counts_ptr + sequence * counts_stride)
    columns = tl.arange(0, BLOCK_K)
    counts_ptrs = counts_ptr + sequence * counts_stride + columns
    counts = tl.load(counts_ptrs, mask=columns < K, other=0)

    maxima = tl.full((BLOCK,), float("-inf"), tl.float32)
    not_finite = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        x, _, valid = _load_block(row, stride, start, V, BLOCK)
        maxima = tl.maximum(maxima, x)
        not_finite += (valid & ((tl.abs(x) < float("inf")) == 0)).to(tl.int32)
    max_logit, not_finite = tl.max(maxima, 0), tl.sum(not_finite, 0)

    # Tokens with a key above t are kept, and the first n of those whose key is t.
    t, n = tl.full((), -(2**31), tl.int64), tl.full((), 0, tl.int64)
    if GREEDY:
        t, n = _key(max_logit), tl.full((), 1, tl.int64)
    elif TOP_K:
        t = _threshold(row, stride, V, max_logit, inverse, t, top_k, False, BLOCK)
        n = top_k - _at_least(row, stride, V, max_logit, inverse, t + 1, False, BLOCK)
    total = _at_least(row, stride, V, max_logit, inverse, t + 1, True, BLOCK)
    if GREEDY or TOP_K:
        total += n * _mass_of_key(t, max_logit, inverse)
    if TOP_P:
        # The wanted mass is total * top_p, rounded up. t becomes the largest key at which the mass
        # of all keys from t on reaches it. Of the tokens with key t, the first n are needed.
        exact = total.to(tl.float64) * (top_p.to(tl.float64) * (1.0 / 9007199254740992.0))
        wanted = exact.to(tl.int64)
        wanted = tl.maximum(wanted + (wanted.to(tl.float64) < exact).to(tl.int64), 1)
        t = _threshold(row, stride, V, max_logit, inverse, t, wanted, True, BLOCK)
        mass_above_t = _at_least(row, stride, V, max_logit, inverse, t + 1, True, BLOCK)
        mass_of_t = _mass_of_key(t, max_logit, inverse)
        n = (wanted - mass_above_t + mass_of_t - 1) // mass_of_t
        total = mass_above_t + n * mass_of_t

    target = (_uniform(tl.load(seed_ptr), number, sequence) * total.to(tl.float64)).to(tl.int64)
    target = tl.minimum(target, total - 1)
    token, mass, seen_equal = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), 0
    for start in range(0, V, BLOCK):
        x, key, valid = _load_block(row, stride, start, V, BLOCK)
        kept = valid & (key > t)
        if GREEDY or TOP_K or TOP_P:
            equal = (valid & (key == t)).to(tl.int32)
            kept |= (equal > 0) & (tl.cumsum(equal, 0) + seen_equal <= n)
            seen_equal += tl.sum(equal, 0)
        each = tl.where(kept, _mass(x, max_logit, inverse), 0)
        token += tl.sum((valid & (tl.cumsum(each, 0) + mass <= target)).to(tl.int64), 0)
        mass += tl.sum(each, 0)
    token = tl.where(not_finite > 0, -1, token)
    tl.store(tokens_ptr + sequence * tokens_stride + number % N, token)
    tl.store(counts_ptrs, counts + 1, mask=columns < K)


def _embed(tokens: Tensor, counts: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    (B, N), C = tokens.shape, wte.shape[1]
    x = wte.new_empty(B, C)
    if x.numel():
        BLOCK = min(launch.block(C), 1024)
        strides = (t.stride(0) for t in (tokens, counts, wte, wpe))
        _embed_kernel[(B, triton.cdiv(C, BLOCK))](
            tokens, counts, wte, wpe, x, N, C, len(wte), len(wpe), *strides, BLOCK
        )
    return x


def _sample(
    logits: Tensor, tokens: Tensor, counts: Tensor, seed: Tensor,
    temperature: float, top_k: int | None, top_p: float | None,
) -> None:  # fmt: skip
    B, V = logits.shape
    inverse, k = inverse_temperature_and_k(V, temperature, top_k, top_p)
    share = None if top_p is None or top_p >= 1 else top_p
    BLOCK = min(launch.block(V), MAX_BLOCK)
    if B:
        _sample_kernel[(B,)](
            logits, tokens, counts, seed, V, tokens.shape[1],
            logits.stride(), tokens.stride(0), counts.stride(0),
            # Not 1: Triton would make it a constexpr, which has no .to().
            inverse, k, max(2, int((share or 0) * 2**53)),
            K=counts.shape[1], GREEDY=temperature == 0, TOP_K=k < V,
            TOP_P=share is not None, BLOCK=BLOCK,
            BLOCK_K=triton.next_power_of_2(counts.shape[1]), num_warps=launch.warps(BLOCK),
        )  # fmt: skip


_embed_op = custom_op(
    "embed_tokens", _embed,
    lambda tokens, counts, wte, wpe: wte.new_empty(len(tokens), wte.shape[1]),
)  # fmt: skip
_sample_op = custom_op("sample_tokens", _sample, mutates=("tokens", "counts"))


def embed_tokens(tokens: Tensor, counts: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """See `eager.embed_tokens`. tokens and counts need contiguous rows."""
    _check(tokens, counts, wte=wte, wpe=wpe)
    checks.shape("VC", wte=wte)
    checks.shape(("context", wte.shape[1]), wpe=wpe)
    checks.same_dtype(wte=wte, wpe=wpe)
    if counts.shape[1] < 2:
        raise ValueError(f"counts must have at least 2 columns, got shape {tuple(counts.shape)}")
    return _embed_op(tokens, counts, wte.contiguous(), wpe.contiguous())


def sample_tokens(
    logits: Tensor, tokens: Tensor, counts: Tensor, seed: int | Tensor, *,
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
) -> None:  # fmt: skip
    """See `eager.sample_tokens`. tokens and counts need contiguous rows."""
    _check(tokens, counts, logits=logits)
    checks.shape((len(tokens), "V"), logits=logits)
    checks.seed_of(seed, logits=logits)
    _sample_op(
        logits, tokens, counts, launch.seed_tensor(seed, logits.device), temperature, top_k, top_p
    )


def _check(tokens: Tensor, counts: Tensor, **floats: Tensor) -> None:
    integers = dict(tokens=tokens, counts=counts)
    checks.tensors(integers=integers, **floats)  # type: ignore[arg-type]
    checks.shape("BN", tokens=tokens)
    checks.shape((len(tokens), "columns"), counts=counts)
    for name, x in integers.items():
        if x.stride(1) != 1:
            raise TypeError(f"{name} must have contiguous rows, got strides {x.stride()}")
