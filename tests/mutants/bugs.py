"""The bugs: kinds that kernels like these have had elsewhere, each in one line of ours.

A bug is (name, old text, new text); the old text stands once in its file.
"""

Bug = tuple[str, str, str]

ATTENTION: list[Bug] = [
    ("a row sees the next column", "cols <= rows, s,", "cols <= rows + 1, s,"),
    ("a row does not see itself", "cols <= rows, s,", "cols < rows, s,"),
    ("the carry is not rescaled", "acc * rescale[:, None]", "acc"),
    ("the sum is not rescaled", "l = l * rescale +", "l = l +"),
    ("the last key tile is skipped", "tl.minimum(start_m + BLOCK_M, T)", "start_m"),
    (
        "dropout before the softmax's sum",
        "    l = l * rescale + tl.sum(p, 1)  # noqa: E741\n    if THRESHOLD > 0:\n"
        "        p = tl.where(philox.attention_keep(seed, head, rows, cols, THRESHOLD), p, 0.0)\n",
        "    if THRESHOLD > 0:\n"
        "        p = tl.where(philox.attention_keep(seed, head, rows, cols, THRESHOLD), p, 0.0)\n"
        "    l = l * rescale + tl.sum(p, 1)  # noqa: E741\n",
    ),
    ("every head drops alike", "attention_keep(seed, head, rows,", "attention_keep(seed, 0, rows,"),
    (
        "a row drops as its column",
        "seed, head, rows, cols, THRESHOLD), p,",
        "seed, head, cols, rows, THRESHOLD), p,",
    ),
    ("no keep scale", "acc * (keep_scale / l)[:, None]", "acc * (1.0 / l)[:, None]"),
    ("lse with a natural logarithm", "m + tl.log2(l)", "m + tl.log(l)"),
    ("exponents to base 2 of scores to base e", "scale * math.log2(math.e)", "scale"),
    (
        "lse offset in int32",
        "lse_ptr + tl.cast(head, tl.int64) * T + rows",
        "lse_ptr + head * T + rows",
    ),
    ("lse written past the end", "m + tl.log2(l), mask=rows < T)", "m + tl.log2(l))"),
    ("heads and batches swapped", "b, h = head // H, head % H", "b, h = head % H, head // H"),
]

ATTENTION_TILES: list[Bug] = [
    ("batch offset in int32", "tl.cast(b, tl.int64) * strides[0]", "b * strides[0]"),
    ("head read at another's stride", "tl.cast(h, tl.int64) * strides[1]", "h * strides[0]"),
    ("columns taken for contiguous", "cols[None, :] * strides[3]", "cols[None, :]"),
    (
        "rows past the end are read",
        "tl.load(ptrs, mask=(rows < T)[:, None] & (cols < D)[None, :], other=0.0)",
        "tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)",
    ),
    (
        "padded columns are written",
        "tile.to(ptr.dtype.element_ty), mask=(rows < T)[:, None] & (cols < D)[None, :]",
        "tile.to(ptr.dtype.element_ty), mask=(rows < T)[:, None]",
    ),
]

ATTENTION_BACKWARD: list[Bug] = [
    ("delta dropped", "ds = p * (dz - delta[:, None])", "ds = p * dz"),
    ("delta dropped for keys", "ds = p * (dz - delta)", "ds = p * dz"),
    ("scale missing in dq", "store_tile(scale * dq,", "store_tile(dq,"),
    ("scale missing in dk", "store_tile(scale * dk,", "store_tile(dk,"),
    ("keep scale missing in dv", "store_tile(keep_scale * dv,", "store_tile(dv,"),
    ("dv of weights that were dropped", "z = tl.where(keep, p, 0.0)", "z = p"),
    ("dk of weights that were dropped", "dz = tl.where(keep, dz, 0.0)", "dz = 1.0 * dz"),
    (
        "dq with the mask of another head",
        "attention_keep(seed, head, rows, cols, THRESHOLD), dz,",
        "attention_keep(seed, head + 1, rows, cols, THRESHOLD), dz,",
    ),
    (
        "keep scale missing in dq",
        'dz = tl.dot(dout, tl.trans(v), input_precision="ieee") * (256 / (256 - THRESHOLD))',
        'dz = tl.dot(dout, tl.trans(v), input_precision="ieee")',
    ),
    (
        "dq of what a row does not see",
        "    if DIAGONAL:\n        p = tl.where(cols <= rows, p, 0.0)\n    dz = tl.dot(dout",
        "    dz = tl.dot(dout",
    ),
    (
        "the first query tile is skipped",
        "diagonal = start_n // BLOCK_M * BLOCK_M",
        "diagonal = start_n // BLOCK_M * BLOCK_M + BLOCK_M",
    ),
    ("a ragged query tile is read whole", "False, not WHOLE, THRESHOLD", "False, False, THRESHOLD"),
    (
        "lse read past the end",
        "lse = tl.load(lse_ptr + stats, mask=rows < T, other=0.0)[None, :]",
        "lse = tl.load(lse_ptr + stats)[None, :]",
    ),
    (
        "dout read at the strides of out",
        "dout.stride(), q.stride(), k.stride(), v.stride(), out.stride(), dq.stride(),",
        "out.stride(), q.stride(), k.stride(), v.stride(), out.stride(), dq.stride(),",
    ),
    (
        "statistics' offset in int32",
        "stats = tl.cast(head, tl.int64) * T + rows\n",
        "stats = head * T + rows\n",
    ),
    ("delta left unwritten past the first tile", "delta, mask=rows < T)", "delta, mask=rows < 32)"),
]

LAYER_NORM: list[Bug] = [
    (
        "padding counts in the mean's correction",
        "centred = tl.where(valid, x - mean[:, None], 0.0)",
        "centred = x - mean[:, None]",
    ),
    (
        "padding counts in the variance",
        "return tl.where(valid, centred - rest[:, None], 0.0)",
        "return centred - rest[:, None]",
    ),
    (
        "variance as a difference of squares",
        "tl.sum(centred * centred, axis=1) / N + eps",
        "tl.sum(x * x, axis=1) / N - mean * mean + eps",
    ),
    ("eps forgotten", "centred, axis=1) / N + eps)", "centred, axis=1) / N)"),
    ("projection on xhat missing", " - xhat * mean_gx[:, None])", ")"),
    ("projection on 1 missing", "(g - mean_g[:, None] -", "(g -"),
    ("weight missing in dx", "g = dy * weight[None, :]", "g = dy"),
    ("dweight of the last rows only", "dweight += tl.sum(", "dweight = tl.sum("),
    ("partials not all summed", "partial.sum(0)", "partial[0]"),
    ("dy read at the stride of x", "rows[:, None] * stride_dym", "rows[:, None] * stride_xm"),
    ("rows in int32", "tl.cast(row_block, tl.int64) * BLOCK_M", "row_block * BLOCK_M"),
    (
        "any layout taken for contiguous rows",
        "return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()",
        "return x",
    ),
    (
        "rstd written past the end",
        "rstd_ptr + rows, rstd, mask=rows < M)",
        "rstd_ptr + rows, rstd)",
    ),
    (
        "mean of the backward uncorrected",
        "return _centred(x, valid, mean, N) * rstd[:, None]",
        "return tl.where(valid, (x - mean[:, None]) * rstd[:, None], 0.0)",
    ),
    ("mean uncorrected", "rest = tl.sum(centred, axis=1) / N", "rest = 0.0 * mean"),
]

DROPOUT_ADD_LAYER_NORM: list[Bug] = [
    ("no keep scale", "threshold), scale, 0.0)", "threshold), 1.0, 0.0)"),
    ("gradient of the sum ignored", "dx += tl.load(dsum_ptrs", "dx += 0 * tl.load(dsum_ptrs"),
    (
        "gradient of what was dropped",
        "dx *= _keep(seed_ptr, rows, cols, threshold, scale)",
        "dx *= scale",
    ),
    (
        "norm of the unrounded sum",
        "normalize(total.to(tl.float32),",
        "normalize(residual + branch,",
    ),
    ("residual at the branch's stride", "rows[:, None] * stride_rm", "rows[:, None] * stride_bm"),
    ("dbias of the last rows only", "dbias += tl.sum(", "dbias = tl.sum("),
    ("gradient of the norm replaces", "dx += input_gradient(", "dx = 2 * input_gradient("),
]

SOFTMAX: list[Bug] = [
    ("no maximum subtracted", "e = tl.exp(a - tl.max(a, axis=1)[:, None])", "e = tl.exp(a)"),
    ("the sum is not rescaled", "total = total * rescale + e", "total = total + e"),
    ("delta is not rescaled", "weighted = weighted * rescale +", "weighted = weighted +"),
    ("lanes meet without their maxima", "tl.sum(total * rescale, axis=0)", "tl.sum(total, axis=0)"),
    (
        "causal by the row of the matrix",
        "seen = seen & (cols <= rows % N)",
        "seen = seen & (cols <= rows)",
    ),
    ("columns are loaded too late", "cols // 16 * 16 <= rows % N", "cols // 16 * 16 < rows % N"),
    ("a row does not see itself", "end = row % N + 1", "end = row % N"),
    ("scale missing in dx", "tl.where(seen, scale * y * dy, 0.0)", "tl.where(seen, y * dy, 0.0)"),
    ("scale missing in dx of long rows", "scale * y * (dy - delta", "y * (dy - delta"),
    (
        "delta dropped",
        "    dy -= tl.sum(dy * y, axis=1)[:, None]\n"
        "    dy -= tl.sum(dy * y, axis=1)[:, None]  # what rounding left of delta\n",
        "",
    ),
    (
        "delta taken off once",
        "    dy -= tl.sum(dy * y, axis=1)[:, None]  # what rounding left of delta\n",
        "",
    ),
    ("delta of long rows taken off once", "(dy - delta - left_row)", "(dy - delta)"),
    ("dy of the future counts", "tl.where(seen, dy.to(tl.float32), 0.0)", "dy.to(tl.float32)"),
    ("dy taken for contiguous", "dy_ptr + rows * dy_stride_m", "dy_ptr + rows * N"),
    (
        "offsets in int32",
        "tl.program_id(0).to(tl.int64)  # int64: M N passes 2^31 on big batches",
        "tl.program_id(0)",
    ),
    (
        "rows past the end are written",
        "y, mask=(rows < M) & (cols < N))",
        "y, mask=(rows > -1) & (cols < N))",
    ),
    (
        "the last block of a long row is left out",
        "for start in range(0, end, BLOCK_N):\n"
        "        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)\n"
        "        x = tl.load(x_row + cols * x_stride,",
        "for start in range(0, end - BLOCK_N + 1, BLOCK_N):\n"
        "        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)\n"
        "        x = tl.load(x_row + cols * x_stride,",
    ),
]

CROSS_ENTROPY: list[Bug] = [
    ("ignored rows lose", "tl.where(counted, loss, 0.0)", "loss"),
    ("ignored rows count", "n = (t != ignore_index).sum()", "n = (t == t).sum()"),
    ("upstream gradient ignored", "tl.load(dloss_ptr) / tl.load", "1.0 / tl.load"),
    ("the sum is not rescaled", "rest = rest * tl.exp(m - shift) +", "rest = rest +"),
    ("no 1 taken from the true class", "tl.where(cols == t[:, None], -rest[:, None], e)", "e"),
    ("ignored rows learn", "mask = counted[:, None] & (cols < V)\n    x = tl.load(x_rows",
     "mask = (rows < M)[:, None] & (cols < V)\n    x = tl.load(x_rows"),
    ("targets taken for contiguous", "t_ptr + rows * t_stride, mask=rows < M, other=0)\n"
     "    counted = (rows < M) & (t != ignore_index)\n    x_rows = x_ptr + rows * x_stride_m\n\n",
     "t_ptr + rows, mask=rows < M, other=0)\n"
     "    counted = (rows < M) & (t != ignore_index)\n    x_rows = x_ptr + rows * x_stride_m\n\n"),
    ("logits taken for contiguous", "x_rows = x_ptr + rows * x_stride_m\n    x_t",
     "x_rows = x_ptr + rows * V\n    x_t"),
    ("offsets in int32", "row_tile, col_tile = tl.program_id(0).to(tl.int64),",
     "row_tile, col_tile = tl.program_id(0),"),
    ("columns past the end are written",
     "dx, mask=(rows < M)[:, None] & (cols < V))", "dx, mask=(rows < M)[:, None] & (cols > -1))"),
    ("gradient not divided by the count", "tl.load(n_ptr).to(tl.float32) / total", "1.0 / total"),
]  # fmt: skip

GELU: list[Bug] = [
    ("another constant", "(1.0 + 0.044715 * z * z)", "(1.0 + 0.04471 * z * z)"),
    ("another constant in the slope", "0.134145", "0.044715"),
    ("dbias of the last rows only", "db += dx", "db = dx"),
    ("bias forgotten in the backward", "            z += b\n", "            z += 0 * b\n"),
    ("partials not all summed", "db.sum(0)", "db[:1].sum(0)"),
    ("rows past the end are written", "z * s, mask=mask)", "z * s, mask=cols < N)"),
    ("dy taken for contiguous", "dy_ptr + rows * dy_stride_m", "dy_ptr + rows * N"),
    ("slope without its sign", "tl.where(u2 >= 0.0, 1.0, e) * r", "1.0 * r"),
    ("rows in int32", "tl.cast(row_tile, tl.int64) * BLOCK_M", "row_tile * BLOCK_M"),
    ("two programs write one partial", "tl.cast(part, tl.int64) * N", "tl.cast(0, tl.int64) * N"),
]

PHILOX: list[Bug] = [
    ("fewer calls for a row's columns", "cols // 16, rows", "cols // 32, rows"),
    ("rows repeat after 2^32", "(row >> 32).to(tl.uint32)", "(row >> 40).to(tl.uint32)"),
    ("every head drops alike", "zero + head, zero, 7)", "zero, zero, 7)"),
    ("one row in eight draws", "rows // 32 * 8 + rows % 8", "rows // 32 * 8 + rows // 8 % 4"),
]

# By module: its bugs, the tests of its own, and the ops by which `test_sanitizer` names it.
BUGS: dict[str, tuple[list[Bug], str, str]] = {
    "attention": (ATTENTION, "test_attention.py test_attention_dropout.py", "causal_attention"),
    "attention_tiles": (
        ATTENTION_TILES,
        "test_attention.py test_attention_dropout.py",
        "causal_attention",
    ),
    "attention_backward": (
        ATTENTION_BACKWARD,
        "test_attention.py test_attention_dropout.py",
        "causal_attention",
    ),
    "layer_norm": (LAYER_NORM, "test_layer_norm.py", "layer_norm"),
    "dropout_add_layer_norm": (
        DROPOUT_ADD_LAYER_NORM,
        "test_dropout_add_layer_norm.py",
        "dropout_add_layer_norm",
    ),
    "softmax": (SOFTMAX, "test_softmax.py", "softmax"),
    "cross_entropy": (CROSS_ENTROPY, "test_cross_entropy.py", "cross_entropy"),
    "gelu": (GELU, "test_gelu.py", "gelu"),
    "philox": (
        PHILOX,
        "test_philox.py test_attention_dropout.py test_dropout_add_layer_norm.py",
        "dropout",
    ),
}
