"""The bugs of attention and its dropout masks; see `run`."""

from tests.mutants.rows import Bug

ATTENTION: list[Bug] = [
    ("a row sees the next column", "cols <= {{rows -> rows + 1}}, s,"),
    ("a row does not see itself", "cols {{<= -> <}} rows, s,"),
    ("the carry is not rescaled", "acc{{ * rescale[:, None] -> }}"),
    ("the sum is not rescaled", "l = l{{ * rescale -> }} +"),
    ("the last key tile is skipped", "{{tl.minimum(start_m + BLOCK_M, T) -> start_m}}"),
    ("dropout before the softmax's sum",
     "        {{p -> l += tl.sum(tl.where(keep, 0.0, -p), 1)\n"
     "        p}} = tl.where(keep, p, 0.0)\n"),
    ("every head drops alike", "keep(seed, {{head -> 0}}, start_m,"),
    ("a row drops as its column",
     "{{start_m, start_n, BLOCK_M, BLOCK_N, THRESHOLD -> "
     "start_n, start_m, BLOCK_N, BLOCK_M, THRESHOLD, True}})"),
    ("no keep scale", "acc * ({{keep_scale -> 1.0}} / l)"),
    ("a natural logarithm is kept", "{{tl.log2 -> tl.log}}(l)"),
    ("exponents to base 2 of scores to base e", "scale{{ * math.log2(math.e) -> }}"),
    ("statistics' offset in int32", "at = {{tl.cast(head, tl.int64) -> head}} * T + rows"),
    ("m written past the end", "m{{, mask=rows < T -> }})"),
    ("l written past the end", "tl.log2(l){{, mask=rows < T -> }})"),
    ("heads and batches swapped", "b, h = head {{// H, head % H -> % H, head // H}}"),
]  # fmt: skip

ATTENTION_TILES: list[Bug] = [
    ("batch offset in int32", "{{tl.cast(b, tl.int64) -> b}} * strides[0]"),
    ("head read at another's stride", "{{tl.cast(h, tl.int64) * strides[1] -> h * strides[0]}}"),
    ("columns taken for contiguous", "cols[None, :]{{ * strides[3] -> }}"),
    ("rows past the end are read",
     "tl.load(ptrs, mask={{(rows < T)[:, None] & (cols < D) -> "
     "(cols < D)}}[None, :], other=0.0)"),
    ("weights are not normalized, exact", "tl.exp2({{(s - m) - log_l -> s - m + 0 * log_l}})"),
    ("weights are not normalized", "        m += {{log_l -> 0}}\n"),
    ("m and log2(l) are rounded together", "tl.exp2({{(s - m) - log_l -> s - (m + log_l)}})"),
    ("padded columns are written",
     "tile.to(ptr.dtype.element_ty), mask=(rows < T)[:, None]{{ & (cols < D)[None, :] -> }}"),
]  # fmt: skip

ATTENTION_BACKWARD: list[Bug] = [
    ("delta dropped", "return p * {{(dz - delta[:, None]) -> dz}}, k"),
    ("delta dropped for keys", "ds = p * {{(dz - delta) -> dz}}"),
    ("scale missing in dq", "store_tile({{scale * dq -> dq}},"),
    ("scale missing in dk", "store_tile({{scale * dk -> dk}},"),
    ("keep scale missing in dv", "store_tile({{keep_scale * dv -> dv}},"),
    ("dv of weights that were dropped", "z = {{tl.where(keep, p, 0.0) -> p}}"),
    ("dk of weights that were dropped", "dz = {{tl.where(keep, dz, 0.0) -> 1.0 * dz}}\n    dv"),
    ("dq with the mask of another head", "attention_keep(seed, {{head -> head + 1}}, start_m"),
    ("keep scale missing in dq",
     'dz = tl.dot(dout, tl.trans(v), input_precision="ieee"){{ * (256 / (256 - THRESHOLD)) '
     "-> }}"),
    ("dq of what a row does not see",
     "tl.where({{(cols <= rows) & (rows > 0) -> rows > 0}}, p, 0.0)"),
    ("the first query tile is skipped",
     "diagonal = start_n // BLOCK_M * {{BLOCK_M -> BLOCK_M + BLOCK_M}}"),
    ("a ragged query tile is read whole", "False, {{not EVEN_M -> False}}, THRESHOLD"),
    ("m read past the end",
     "at, rows < {{T -> T + 9}}, q.dtype == tl.float32)\n    delta = tl.load"),
    ("float32's delta keeps its rounding", "{{        delta += ds_sum\n -> }}"),
    ("the first row has a gradient in dq", "{{(cols <= rows) & (rows > 0) -> cols <= rows}}"),
    ("the first row has a gradient in dk", "ds = {{tl.where(rows > 0, ds, 0.0) -> 1.0 * ds}}"),
    ("dout read at the strides of out",
     "{{dout.stride -> out.stride}}(), q.stride(), k.stride(), v.stride(), out.stride(), "
     "dq.stride(),"),
    ("statistics' offset in int32", "at = {{tl.cast(head, tl.int64) -> head}} * T + rows\n"),
    ("delta left unwritten past the first tile", "delta, mask=rows < {{T -> 32}})"),
]  # fmt: skip

ATTENTION_HEAD_BACKWARD: list[Bug] = [
    ("delta dropped", "{{p * delta_factor[:, None] -> 0.0 * p}})"),
    ("delta of the scaled weights", "{{delta * (THRESHOLD / 256 - 1) -> -delta}}"),
    ("keep scale missing", "m += log_l{{ - tl.log2(256 / (256 - THRESHOLD)) -> }}"),
    ("dv of weights that were dropped", "z, ds = {{z.to -> p.to}}(q.dtype), ds"),
    ("dk of weights that were dropped", "tl.fma({{z -> p}}, tl.dot"),
    ("every head drops alike", "keep(seed, {{head -> 0}}, start_m"),
    ("a row sees the next column", "cols <= {{rows -> rows + 1}}, tl"),
    ("a row does not see itself", "cols {{<= -> <}} rows, tl"),
    ("the first row has a gradient", "{{tl.where(rows > 0, ds, 0.0) -> 1.0 * ds}}"),
    ("the first row of each half has none",
     "if {{start_m == 0: -> True:\n        rows -= start_m}}"),
    ("scale missing in dk", "store_tile({{scale * dk -> dk}},"),
    ("scale missing in the upper half's dq", "store_tile({{scale * upper -> upper}},"),
    ("scale missing in the lower half's dq",
     "store_tile({{scale * dq -> dq}}, dq_ptr, grad_strides, b, h, HALF"),
    ("scale missing in a whole dq",
     "store_tile({{scale * dq -> dq}}, dq_ptr, grad_strides, b, h, 0"),
    ("the halves are exchanged", "{{upper, dq -> dq, upper}} = _halves(dq)"),
    ("m of the upper half", "{{_, m -> m, _}} = _halves(m)"),
    ("delta of the upper half", "{{_, delta_factor -> delta_factor, _}} = _halves(delta_factor)"),
    ("the lower half's dq starts from 0",
     "        {{_ -> dq = 0.0 * dq\n        _}}, m = _halves(m)"),
    ("q of the upper half", "q = load_tile(q_ptr, q_strides, b, h, {{HALF -> 0}},"),
    ("the last keys of the upper half are skipped",
     "BLOCK_M // {{2 -> 2 - BLOCK_N}} if SPLIT else T"),
    ("the last key is skipped", "range(HALF, {{T -> T - 1}}, BLOCK_N)"),
    ("m read past the end", "at, rows < {{T -> T + 9}}, True)"),
    ("a ragged key tile is read whole", "seed, {{not SPLIT -> False}},"),
    ("dout read at the strides of out",
     "{{dout.stride -> out.stride}}(), q.stride(), k.stride(), v.stride(), out.stride(), "
     "dq.stride()"),
    ("dk from the weights", "        dk = tl.dot(tl.trans({{ds -> z}}), q)"),
]  # fmt: skip

PHILOX: list[Bug] = [
    ("fewer calls for a row's columns", "cols // {{16 -> 32}}, rows"),
    ("rows repeat after 2^32", "(row >> {{32 -> 40}}).to(tl.uint32)"),
    ("every head drops alike", "zero{{ + head -> }}, zero, ROUNDS)"),
    ("eight rows share their bits", "tile * 8 + {{tl.arange(0, 8) -> tl.arange(0, 8) // 8}}"),
    ("each tile starts again", "{{start // 32 * 8 + counter -> counter}}"),
    ("short tiles start again", "group += {{start // 8 % 4 -> 0}}"),
    ("words are exchanged", "tl.where(word < 2, {{w0, w2 -> w2, w0}})"),
]  # fmt: skip
