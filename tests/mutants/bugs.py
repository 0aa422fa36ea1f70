"""Kinds of bugs that other kernels have had, each as a one-line change of ours.

A bug is (name, old text, new text); the old text occurs exactly once in its file.
"""

from tests.mutants.optimizer import ADAMW, GRAD_NORM, MUON
from tests.mutants.rows import (
    CROSS_ENTROPY,
    DROPOUT_ADD_LAYER_NORM,
    EMBED_LAYER_NORM,
    GELU,
    LAYER_NORM,
    LAYER_NORM_BACKWARD,
    NORM_PARAMETERS,
    SOFTMAX,
    Bug,
)
from tests.mutants.tokens import DECODE_ATTENTION, DECODE_LINEAR, DECODE_TOKENS

ATTENTION: list[Bug] = [
    ("a row sees the next column", "cols <= rows, s,", "cols <= rows + 1, s,"),
    ("a row does not see itself", "cols <= rows, s,", "cols < rows, s,"),
    ("the carry is not rescaled", "acc * rescale[:, None]", "acc"),
    ("the sum is not rescaled", "l = l * rescale +", "l = l +"),
    ("the last key tile is skipped", "tl.minimum(start_m + BLOCK_M, T)", "start_m"),
    ("dropout before the softmax's sum",
     "        p = tl.where(keep, p, 0.0)\n",
     "        l += tl.sum(tl.where(keep, 0.0, -p), 1)\n        p = tl.where(keep, p, 0.0)\n"),
    ("every head drops alike", "keep(seed, head, start_m,", "keep(seed, 0, start_m,"),
    ("a row drops as its column",
     "start_m, start_n, BLOCK_M, BLOCK_N, THRESHOLD)",
     "start_n, start_m, BLOCK_N, BLOCK_M, THRESHOLD, True)"),
    ("no keep scale", "acc * (keep_scale / l)", "acc * (1.0 / l)"),
    ("a natural logarithm is kept", "tl.log2(l)", "tl.log(l)"),
    ("exponents to base 2 of scores to base e", "scale * math.log2(math.e)", "scale"),
    ("statistics' offset in int32",
     "stats = tl.cast(head, tl.int64) * T + rows", "stats = head * T + rows"),
    ("m written past the end", "m, mask=rows < T)", "m)"),
    ("l written past the end", "tl.log2(l), mask=rows < T)", "tl.log2(l))"),
    ("heads and batches swapped", "b, h = head // H, head % H", "b, h = head % H, head // H"),
]  # fmt: skip

ATTENTION_TILES: list[Bug] = [
    ("batch offset in int32", "tl.cast(b, tl.int64) * strides[0]", "b * strides[0]"),
    ("head read at another's stride", "tl.cast(h, tl.int64) * strides[1]", "h * strides[0]"),
    ("columns taken for contiguous", "cols[None, :] * strides[3]", "cols[None, :]"),
    ("rows past the end are read",
     "tl.load(ptrs, mask=(rows < T)[:, None] & (cols < D)[None, :], other=0.0)",
     "tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)"),
    ("weights are not normalized, exact", "tl.exp2((s - m) - log_l)", "tl.exp2(s - m + 0 * log_l)"),
    ("weights are not normalized", "        m += log_l\n", "        m += 0\n"),
    ("m and log2(l) are rounded together", "tl.exp2((s - m) - log_l)", "tl.exp2(s - (m + log_l))"),
    ("padded columns are written",
     "tile.to(ptr.dtype.element_ty), mask=(rows < T)[:, None] & (cols < D)[None, :]",
     "tile.to(ptr.dtype.element_ty), mask=(rows < T)[:, None]"),
]  # fmt: skip

ATTENTION_BACKWARD: list[Bug] = [
    ("delta dropped", "return p * (dz - delta[:, None]), k", "return p * dz, k"),
    ("delta dropped for keys", "ds = p * (dz - delta)", "ds = p * dz"),
    ("scale missing in dq", "store_tile(scale * dq,", "store_tile(dq,"),
    ("scale missing in dk", "store_tile(scale * dk,", "store_tile(dk,"),
    ("keep scale missing in dv", "store_tile(keep_scale * dv,", "store_tile(dv,"),
    ("dv of weights that were dropped", "z = tl.where(keep, p, 0.0)", "z = p"),
    ("dk of weights that were dropped",
     "dz = tl.where(keep, dz, 0.0)\n    dv", "dz = 1.0 * dz\n    dv"),
    ("dq with the mask of another head",
     "attention_keep(seed, head, start_m", "attention_keep(seed, head + 1, start_m"),
    ("keep scale missing in dq",
     'dz = tl.dot(dout, tl.trans(v), input_precision="ieee") * (256 / (256 - THRESHOLD))',
     'dz = tl.dot(dout, tl.trans(v), input_precision="ieee")'),
    ("dq of what a row does not see",
     "tl.where((cols <= rows) & (rows > 0), p, 0.0)", "tl.where(rows > 0, p, 0.0)"),
    ("the first query tile is skipped", "diagonal = start_n // BLOCK_M * BLOCK_M",
     "diagonal = start_n // BLOCK_M * BLOCK_M + BLOCK_M"),
    ("a ragged query tile is read whole",
     "False, not EVEN_M, THRESHOLD", "False, False, THRESHOLD"),
    ("m read past the end", "stats, rows < T, q.dtype == tl.float32)\n    delta = tl.load",
     "stats, rows < T + 9, q.dtype == tl.float32)\n    delta = tl.load"),
    ("float32's delta keeps its rounding", "        delta += rest\n", ""),
    ("the first row has a gradient in dq", "(cols <= rows) & (rows > 0)", "cols <= rows"),
    ("the first row has a gradient in dk", "ds = tl.where(rows > 0, ds, 0.0)", "ds = 1.0 * ds"),
    ("dout read at the strides of out",
     "dout.stride(), q.stride(), k.stride(), v.stride(), out.stride(), dq.stride(),",
     "out.stride(), q.stride(), k.stride(), v.stride(), out.stride(), dq.stride(),"),
    ("statistics' offset in int32",
     "stats = tl.cast(head, tl.int64) * T + rows\n", "stats = head * T + rows\n"),
    ("delta left unwritten past the first tile", "delta, mask=rows < T)", "delta, mask=rows < 32)"),
]  # fmt: skip

ATTENTION_HEAD_BACKWARD: list[Bug] = [
    ("delta dropped", "p * delta[:, None])", "0.0 * p)"),
    ("delta of the scaled weights", "delta * (THRESHOLD / 256 - 1)", "-delta"),
    ("keep scale missing", "m += log_l - tl.log2(256 / (256 - THRESHOLD))", "m += log_l"),
    ("dv of weights that were dropped", "z, ds = z.to(q.dtype), ds", "z, ds = p.to(q.dtype), ds"),
    ("dk of weights that were dropped", "tl.fma(z, tl.dot", "tl.fma(p, tl.dot"),
    ("every head drops alike", "keep(seed, head, start_m", "keep(seed, 0, start_m"),
    ("a row sees the next column", "cols <= rows, tl", "cols <= rows + 1, tl"),
    ("a row does not see itself", "cols <= rows, tl", "cols < rows, tl"),
    ("the first row has a gradient", "tl.where(rows > 0, ds, 0.0)", "1.0 * ds"),
    ("the first row of each half has none",
     "if start_m == 0:", "if True:\n        rows -= start_m"),
    ("scale missing in dk", "store_tile(scale * dk,", "store_tile(dk,"),
    ("scale missing in the upper half's dq", "store_tile(scale * upper,", "store_tile(upper,"),
    ("scale missing in the lower half's dq",
     "store_tile(scale * dq, dq_ptr, grad_strides, b, h, HALF", "store_tile(dq, dq_ptr, "
     "grad_strides, b, h, HALF"),
    ("scale missing in a whole dq",
     "store_tile(scale * dq, dq_ptr, grad_strides, b, h, 0", "store_tile(dq, dq_ptr, "
     "grad_strides, b, h, 0"),
    ("the halves are exchanged", "upper, dq = _halves(dq)", "dq, upper = _halves(dq)"),
    ("m of the upper half", "_, m = _halves(m)", "m, _ = _halves(m)"),
    ("delta of the upper half", "_, delta = _halves(delta)", "delta, _ = _halves(delta)"),
    ("the lower half's dq starts from 0",
     "        _, m = _halves(m)", "        dq = 0.0 * dq\n        _, m = _halves(m)"),
    ("q of the upper half", "q = load_tile(q_ptr, q_strides, b, h, HALF,",
     "q = load_tile(q_ptr, q_strides, b, h, 0,"),
    ("the last keys of the upper half are skipped",
     "BLOCK_M // 2 if SPLIT else T", "BLOCK_M // 2 - BLOCK_N if SPLIT else T"),
    ("the last key is skipped", "range(HALF, T, BLOCK_N)", "range(HALF, T - 1, BLOCK_N)"),
    ("m read past the end", "stats, rows < T, True)", "stats, rows < T + 9, True)"),
    ("a ragged key tile is read whole", "seed, not SPLIT,", "seed, False,"),
    ("dout read at the strides of out",
     "dout.stride(), q.stride(), k.stride(), v.stride(), out.stride(), dq.stride()",
     "out.stride(), q.stride(), k.stride(), v.stride(), out.stride(), dq.stride()"),
    ("dk from the weights",
     "        dk = tl.dot(tl.trans(ds), q)", "        dk = tl.dot(tl.trans(z), q)"),
]  # fmt: skip

PHILOX: list[Bug] = [
    ("fewer calls for a row's columns", "cols // 16, rows", "cols // 32, rows"),
    ("rows repeat after 2^32", "(row >> 32).to(tl.uint32)", "(row >> 40).to(tl.uint32)"),
    ("every head drops alike", "zero + head, zero, 7)", "zero, zero, 7)"),
    ("eight rows share their bits",
     "tile * 8 + tl.arange(0, 8)", "tile * 8 + tl.arange(0, 8) // 8"),
    ("each tile starts anew", "start // 32 * 8 + counter", "counter"),
    ("short tiles start anew", "eight += start // 8 % 4", "eight += 0"),
    ("words are exchanged", "tl.where(word < 2, w0, w2)", "tl.where(word < 2, w2, w0)"),
]  # fmt: skip

# For each module: its bugs, the test files of its ops alone, and what pytest -k selects in those of
# all ops, test_op_contract.py and test_sanitizer.py.
BUGS: dict[str, tuple[list[Bug], str, str]] = {
    "attention": (ATTENTION, "attention", "causal_attention"),
    "attention_tiles": (ATTENTION_TILES, "attention", "causal_attention"),
    "attention_backward": (ATTENTION_BACKWARD, "attention", "causal_attention"),
    "attention_head_backward": (
        ATTENTION_HEAD_BACKWARD,
        "attention_head",
        "causal_attention",
    ),
    "layer_norm": (LAYER_NORM, "layer_norm", "layer_norm"),
    "layer_norm_backward": (
        LAYER_NORM_BACKWARD,
        "layer_norm dropout_add_layer_norm",
        "layer_norm",
    ),
    "dropout_add_layer_norm": (
        DROPOUT_ADD_LAYER_NORM,
        "dropout_add_layer_norm",
        "dropout_add_layer_norm",
    ),
    "norm_parameters": (
        NORM_PARAMETERS,
        "norm_parameters embed_layer_norm",
        "layer_norm",
    ),
    "embed_layer_norm": (EMBED_LAYER_NORM, "embed_layer_norm", "embed_layer_norm"),
    "softmax": (SOFTMAX, "softmax", "softmax"),
    "cross_entropy": (CROSS_ENTROPY, "cross_entropy", "cross_entropy"),
    "decode_attention": (DECODE_ATTENTION, "decode_attention", "decode_attention"),
    "decode_linear": (DECODE_LINEAR, "decode_linear", "linear"),
    "decode_tokens": (DECODE_TOKENS, "decode_tokens", "tokens"),
    "gelu": (GELU, "gelu", "gelu"),
    "grad_norm": (GRAD_NORM, "adamw", "adamw"),
    "adamw": (ADAMW, "adamw", "adamw"),
    "muon": (MUON, "muon", "muon"),
    "philox": (PHILOX, "philox attention dropout_add_layer_norm", "with and dropout"),
}
