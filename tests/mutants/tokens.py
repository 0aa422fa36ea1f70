"""The bugs of the ops of one token: see `bugs`."""

from tests.mutants.rows import Bug

CACHED_ATTENTION: list[Bug] = [
    ("the new position is read from the cache", "seen = n < tl.min", "seen = n <= tl.min"),
    (
        "the last key is left out",
        "seen = n < tl.minimum(position",
        "seen = n < tl.minimum(position - 1",
    ),
    ("the new key does not count", "    l = 1.0  # noqa: E741", "    l = 0.0  # noqa: E741"),
    ("the new value does not count", "acc = v.to(tl.float32)", "acc = 0 * v.to(tl.float32)"),
    ("the carry is not rescaled", "acc = acc * rescale +", "acc = acc +"),
    ("the sum is not rescaled", "l = l * rescale +", "l = l +"),
    ("later tiles are left out", "tl.minimum(position, N), BLOCK_N)", "BLOCK_N, BLOCK_N)"),
    (
        "the key is written a row late",
        "k_ptrs + position * k_str",
        "k_ptrs + (position + 1) * k_str",
    ),
    ("the value is not written", "v, mask=room)", "v, mask=room & (H < 0))"),
    (
        "a position outside is written",
        "room = inside & (position >= 0) & (position < N)",
        "room = inside",
    ),
    ("heads and batches swapped", "b, h = head // H, head % H", "b, h = head % H, head // H"),
    ("padded columns are read", "& inside[None, :]", "& (d >= 0)[None, :]"),
    ("positions taken for contiguous", "position_ptr + b * position_stride", "position_ptr + b"),
    ("offsets in int32", "head = tl.program_id(0).to(tl.int64)", "head = tl.program_id(0)"),
]

ROW_LINEAR: list[Bug] = [
    ("norm is not rounded", "k, K, eps).to(weight.dtype).to(tl.float32)", "k, K, eps)"),
    (
        "what rounding took from a large mean stays",
        "x = tl.where(k < K, x - tl.sum(x, 0) / K, 0.0)  #",
        "x += 0.0  #",
    ),
    (
        "padding counts in the variance",
        "x = tl.where(k < K, x - tl.sum(x, 0) / K, 0.0)\n",
        "x = x - tl.sum(x, 0) / K\n",
    ),
    ("eps forgotten", "tl.sum(x * x, 0) / K + eps", "tl.sum(x * x, 0) / K"),
    ("product is not rounded", "y = y.to(weight.dtype).to(tl.float32)", "y = 1.0 * y"),
    (
        "norm bias forgotten",
        "norm_weight_ptr, norm_bias_ptr, k, K, eps)",
        "norm_weight_ptr, None, k, K, eps)",
    ),
    (
        "bias of GELU forgotten",
        "            if bias_ptr is not None:",
        "            if H is not None:",
    ),
    ("residual forgotten", "        if residual_ptr is not None:", "        if False:"),
    ("GELU's bias twice", "if not GELU and bias_ptr", "if bias_ptr"),
    ("residual at the stride of x", "at * residual_stride + n", "at * x_stride + n"),
    ("weight taken for contiguous", "n[:, None] * weight_stride", "n[:, None] * K"),
    ("columns past the end are written", "y, mask=n < N)", "y)"),
    (
        "weight read past the end",
        "mask=inside, other=0.0)  # (B",
        "mask=(k < K)[None, :], other=0.0)  # (B",
    ),
    ("one row for all", "for row in range(M)", "for row in range(1)"),
    (
        "offsets in int32",
        "n = tl.program_id(0).to(tl.int64) * BLOCK_N",
        "n = tl.program_id(0) * BLOCK_N",
    ),
]

TOKENS: list[Bug] = [
    ("minus zero is less than zero", "tl.where(x == 0.0, 0.0, x).to(tl.int32", "x.to(tl.int32"),
    (
        "the order of negative logits is turned",
        "tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)",
        "bits",
    ),
    ("no temperature", "tl.exp((x - greatest) * inverse)", "tl.exp(x - greatest)"),
    ("all equals of the last are kept", "equals <= n)", "equals >= 0)"),
    ("equals of earlier blocks are forgotten", "            equals += tl.sum(equal, 0)\n", ""),
    ("masses of earlier blocks are forgotten", "        mass += tl.sum(each, 0)\n", ""),
    ("top-p of all, not of top-k", "        total += n * _mass_of_key(t, greatest, inverse)\n", ""),
    ("top-p keeps one too few", "(wanted - above + one - 1) // one", "(wanted - above) // one"),
    ("every text draws alike", "zero + text.to(tl.uint32)", "zero"),
    ("numbers repeat after 2^32", "zero + (number >> 32).to(tl.uint32)", "zero"),
    ("logits of no use draw", "tl.where(useless > 0, -1, token)", "token"),
    (
        "the number is not counted",
        "tl.store(counts_ptrs, counts + 1,",
        "tl.store(counts_ptrs, counts,",
    ),
    (
        "only the number is counted",
        "counts + 1, mask=columns < K)",
        "counts + 1, mask=columns < 1)",
    ),
    ("the ring does not turn", "tokens_stride + number % N, token)", "tokens_stride, token)"),
    ("no token embeds the last row", "tokens_stride + last), 0)", "tokens_stride + last), -1)"),
    ("the first token is read too early", "last = (drawn + N - 1) % N", "last = drawn % N"),
    ("logits taken for contiguous", "row_ptr + cols * stride,", "row_ptr + cols,"),
    (
        "text's offset in int32",
        "text = tl.program_id(0).to(tl.int64)\n    row,",
        "text = tl.program_id(0)\n    row,",
    ),
]
