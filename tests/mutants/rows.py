"""The bugs of the ops that work row by row; see `run`."""

Bug = tuple[str, str]  # name, text with the change; see `run`

LAYER_NORM: list[Bug] = [
    ("variance as a difference of squares",
     "{{tl.sum(centred * centred, axis=1) / N -> "
     "tl.sum(x * x, axis=1) / N - mean * mean}} + eps"),
    ("eps forgotten", "centred, axis=1) / N{{ + eps -> }})"),
    ("bias read past the end", "bias_ptr + cols{{, mask=cols < N, other=0.0 -> }}"),
    ("rstd written past the end", "rstd_ptr + rows, rstd{{, mask=rows < M -> }})"),
    ("norm of the unrounded sum", "x {{= (x + branch).to(sum_ptr.dtype.element_ty) -> += branch}}"),
    ("branch at the residual's stride", "rows[:, None] * {{branch_stride -> residual_stride}}"),
    ("rows in int32", "tl.program_id(0){{.to(tl.int64) -> }}"),
    ("sum rounded twice", "x + branch){{.to -> .to(tl.float16).to}}("),
    ("gradient of dropout's rate", "wanted, seed, {{ctx.dropout_p -> 0.0}})"),
]  # fmt: skip

LAYER_NORM_BACKWARD: list[Bug] = [
    ("padding counts in the mean's correction",
     "centred = {{tl.where(valid, x - mean[:, None], 0.0) -> x - mean[:, None]}}"),
    ("padding counts in the variance",
     "return {{tl.where(valid, centred - mean_error[:, None], 0.0) -> "
     "centred - mean_error[:, None]}}"),
    ("mean uncorrected", "{{tl.div_rn(tl.sum(centred, axis=1), N * 1.0) -> 0.0 * mean}}"),
    ("mean uncorrected in the backward",
     "xhat = {{centre(x, valid, mean, N) * rstd[:, None] -> "
     "tl.where(valid, (x - mean[:, None]) * rstd[:, None], 0.0)}}"),
    ("projection on xhat missing", "{{ - xhat * mean_gx[:, None] -> }})"),
    ("projection on 1 missing", "(g{{ - mean_g[:, None] -> }} -"),
    ("weight missing in dx", "g = dnorm{{ * weight[None, :] -> }}"),
    ("the weight of wide rows is another one's",
     "                weight = tl.load(weight_ptr + {{cols -> cols * 0}},"),
    ("dweight of the last rows only", "dweight {{+= -> =}} tl.sum("),
    ("dbias of the last rows only", "dbias {{+= -> =}} tl.sum("),
    ("dy read at the stride of x", "rows[:, None] * {{dnorm_stride -> sum_stride}}"),
    ("rows in int32", "{{tl.cast(row_tile, tl.int64) -> row_tile}} * BLOCK_M"),
    ("programs write one partial", "tl.cast({{program -> 0}}, tl.int64) * N"),
    ("any layout taken for contiguous rows",
     "rows = {{launch.contiguous_rows -> launch.as_matrix}}(total)"),
    ("no keep scale", "threshold), {{scale -> 1.0}}, 0.0)"),
    ("gradient of the sum ignored", "dx += {{tl.load -> 0 * tl.load}}(dsum_ptrs"),
    ("gradient of the sum replaces", "dx {{+= -> =}} tl.load(dsum_ptrs"),
    ("gradient of what was dropped",
     "dx *= {{keep_factor(seed_ptr, rows, cols, threshold, scale) -> scale}}"),
    ("dropped from the residual's gradient too",
     "        if {{dresidual_ptr -> seed_ptr is not None:\n"
     "            dx *= keep_factor(seed_ptr, rows, cols, threshold, scale)\n"
     "        if dresidual_ptr}} is not None:\n"
     "            tl.store(dresidual_ptr + offsets, dx, mask=valid)\n"
     "        if dbranch_ptr is not None:\n{{            if seed_ptr is not None:\n"
     "                dx *= keep_factor(seed_ptr, rows, cols, threshold, scale)\n -> }}"),
]  # fmt: skip

NORM_PARAMETERS: list[Bug] = [
    ("partials not all summed", "for start in range(0, {{M, BLOCK_M -> 1}})"),
    ("only the last rows are summed", "total {{+= -> =}} load(matrix"),
    ("rows past the end are summed", "mask = (rows < {{M -> M + 1}})[:, None] &"),
    ("sums past the end are written", "tl.sum(total, 0){{, mask=cols < N -> }})"),
    ("the sum of another matrix", "sum_at = select_address(sums, {{i -> 0}}, mine, sum_at)"),
    ("another matrix's width", "tl.where(mine, widths[{{i -> 0}}], N)"),
    ("programs counted from the first matrix", "first = tl.where(mine, {{firsts[i] -> 0}}, first)"),
    ("a transposed matrix is read as it lies", "{{aligned(m.float()) -> m.float()}}"),
    ("the first matrices again",
     "some, out = tuple(matrices[{{part -> : part.stop - part.start}}])"),
    ("sums in the order of the parameters that have none",
     "[{{None if m is None else next(sums) for m in partial -> "
     "*sums, *(None for m in partial if m is None)}}]"),
    ("a program less than there are rows of the view",
     "if summed else {{len(weight) -> max(1, len(weight) - 1)}}"),
]  # fmt: skip

EMBED_LAYER_NORM: list[Bug] = [
    ("norm of the unrounded sum", "x = {{x.to(x_ptr.dtype.element_ty) -> 1.0 * x}}"),
    ("rows in int32", "tl.program_id(0){{.to(tl.int64) -> }}"),
    ("positions go on in the next sequence", "{{(rows % T) -> rows}}[:, None]"),
    ("wpe at the stride of wte", "* {{wpe_stride -> wte_stride}}"),
    ("rows past the end are found", "tl.load(idx_ptr + rows{{, mask=rows < M, other=0 -> }}) =="),
    ("padding is token 0", "== token) & (rows {{< M -> > -1}})"),
    ("the last part is left out",
     "tl.minimum(begin + part_rows, {{M -> M // part_rows * part_rows}})"),
    ("only the last block counts", "total {{+= -> =}} tl.sum(g"),
    ("every row of a block counts", "mask={{found -> (rows < M)}}[:, None] & (cols"),
    ("columns past the end are written", "row * N + cols, total, mask=cols {{< N -> > -1}})"),
    ("parts write one sum", "tl.cast({{part -> 0}}, tl.int64) * V"),
    ("offsets of rows in int32", "{{rows.to(tl.int64) -> rows}}[:, None] * N"),
    ("parts overlap", "begin = part * {{part_rows -> (part_rows - 1)}}"),
    ("gradient of x itself ignored", "norm_gradients({{dx -> None}}, dnorm,"),
    ("any layout taken for contiguous rows",
     "{{launch.contiguous_rows -> launch.as_matrix}}(wte), launch.contiguous"),
    ("ids of any layout read as contiguous", "wte, wpe, {{idx.contiguous() -> idx}},"),
    ("ids of any layout read as contiguous in the backward",
     "g, {{idx.contiguous() -> idx}}, sums"),
    ("PyTorch's gradient skips a token", "idx, ctx.V, {{-1 -> 0}}, False)"),
]  # fmt: skip

SOFTMAX: list[Bug] = [
    ("no maximum subtracted", "e = exp(a{{ - tl.max(a, axis=1)[:, None] -> }})"),
    ("the sum is not rescaled", "total = total{{ * rescale -> }} + e"),
    ("lanes meet without their maxima", "tl.sum(total{{ * rescale -> }}, axis=0)"),
    ("causal by the row of the matrix", "seen = seen & (cols <= rows{{ % N -> }})"),
    ("columns are loaded too late", "cols // 16 * 16 {{<= -> <}} rows % N"),
    ("a row does not see itself", "end = row % N{{ + 1 -> }}"),
    ("scale missing in dx", "tl.where(seen, {{scale * y -> y}} * dy, 0.0)"),
    ("scale missing in dx of long rows", "{{scale * y -> y}} * (dy - delta"),
    ("delta dropped",
     "{{    dy -= tl.sum(dy * y, axis=1)[:, None]\n"
     "    dy -= tl.sum(dy * y, axis=1)[:, None]  # subtracts the rounding error of delta\n"
     " -> }}"),
    ("delta taken off once",
     "{{    dy -= tl.sum(dy * y, axis=1)[:, None]  # subtracts the rounding error of delta\n"
     " -> }}"),
    ("delta of long rows taken off once", "(dy - delta{{ - delta_error_row -> }})"),
    ("dy of the future counts", "{{tl.where(seen, dy.to(tl.float32), 0.0) -> dy.to(tl.float32)}}"),
    ("dy taken for contiguous", "dy_ptr + rows * {{dy_strides[0] -> N}}"),
    ("offsets in int32", "tl.program_id(0){{.to(tl.int64)  # int64: M N can exceed 2^31 -> }}"),
    ("rows past the end are written", "y, mask=(rows {{< M -> > -1}}) & (cols < N))"),
    ("the last block of a long row is left out",
     "for start in range(0, {{end -> end - BLOCK_N + 1}}, BLOCK_N):\n"
     "        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)\n"
     "        x = tl.load(x_row + cols * x_stride,"),
]  # fmt: skip

CROSS_ENTROPY: list[Bug] = [
    ("ignored rows lose", "{{tl.where(counted, loss, 0.0) -> loss}}"),
    ("ignored rows count", "{{counted.to -> (rows < M).to}}(tl.int64), 0)"),
    ("rows past the end count", "{{counted.to -> (t != ignore_index).to}}(tl.int64), 0)"),
    ("sums beyond the first block lost", "total {{+= -> =}} tl.load("),
    ("counts beyond the first block lost", "n {{+= -> =}} tl.load("),
    ("sums past the end", "sums_ptr + part, mask=part {{< parts -> >= 0}}"),
    ("upstream gradient ignored", "tl.div_rn({{tl.load(dloss_ptr) -> 1.0}}, tl"),
    ("the sum is not rescaled", "rest = rest{{ * tl.exp(m - shift) -> }} +"),
    ("no 1 taken from the true class", "{{tl.where(cols == t[:, None], -rest[:, None], e) -> e}}"),
    ("ignored rows learn",
     "mask = {{counted -> (rows < M)}}[:, None] & (cols < V)\n    x = tl.load(x_rows"),
    ("targets taken for contiguous",
     "t_ptr + rows{{ * t_stride -> }}, mask=rows < M, other=0)\n"
     "    counted = (rows < M) & (t != ignore_index)\n"
     "    x_rows = x_ptr + rows * x_strides[0]\n\n"),
    ("logits taken for contiguous", "x_rows = x_ptr + rows * {{x_strides[0] -> V}}\n    x_t"),
    ("offsets in int32", "row_tile, col_tile = tl.program_id(0){{.to(tl.int64) -> }},"),
    ("columns past the end are written", "dx, mask=(rows < M)[:, None] & (cols {{< V -> > -1}}))"),
    ("gradient not divided by the count", "tl.div_rn({{dloss -> tl.load(dloss_ptr)}}, total)"),
]  # fmt: skip

LINEAR_CROSS_ENTROPY: list[Bug] = [
    ("the sum is not rescaled", "rest = rest{{ * tl.exp(m - shift) -> }} +"),
    ("the logit of the true class of the last block only", "z_t {{+= -> =}} tl.sum("),
    ("the true class counts as another one",
     "e = {{tl.where(true, 0.0, tl.exp(z - shift[:, None])) -> tl.exp(z - shift[:, None])}}"),
    ("padding has a probability", "cols < {{classes -> V}}, z.to(tl.float32)"),
    ("padding has a probability in long rows",
     'z = {{tl.where(at < classes, z.to(tl.float32), float("-inf")) -> z.to(tl.float32)}}\n'
     "            m, rest"),
    ("padding keeps its logits",
     "{{tl.where(cols < classes, e * scale[:, None], 0.0), mask=mask -> "
     "e * scale[:, None], mask=mask & (cols < classes)}}"),
    ("padding is a class", "(t >= {{classes -> V}})"),
    ("targets are checked in int32",
     "{{(t < 0) | (t >= classes) -> (t.to(tl.int32) < 0) | (t.to(tl.int32) >= classes)}}"),
    ("a target that is no class has a loss", 'm = {{tl.where(bad, float("nan"), m) -> m + 0.0}}'),
    ("no 1 taken from the true class", "{{tl.where(cols == t[:, None], -rest[:, None], e) -> e}}"),
    ("loss scale ignored", "scale = {{tl.load -> 1.0 + 0 * tl.load}}(scale_ptr)"),
    ("gradient not divided by the count", "{{tl.div_rn(scale, n) -> scale}}, total)"),
    ("gradient not divided by the sum",
     "tl.div_rn(tl.div_rn(scale, n), {{total -> total * 0 + 1}})"),
    ("rows past the end lose", "{{tl.where(rows < M, loss, 0.0) -> loss}}"),
    ("rows past the end are written", "mask = (rows {{< M -> > -1}})[:, None] & (cols < V)"),
    ("columns past the end are written", "mask = (rows < M)[:, None] & (at {{< V -> > -1}})"),
    ("rows in int32", "tl.program_id(0){{.to(tl.int64) -> }}"),
    ("sums beyond the first block lost", "total {{+= -> =}} tl.load("),
    ("sums past the end", "sums_ptr + part, mask=part {{< parts -> >= 0}}"),
    ("loss not divided by the count", "{{tl.div_rn(tl.sum(total, 0), n) -> tl.sum(total, 0)}}"),
    ("each chunk is a separate mean", "t[part], sums[first // BLOCK_M :], {{M -> len(z)}},"),
    ("the sums of chunks over each other", "{{sums[first // BLOCK_M :] -> sums}}"),
    ("dweight of the first chunk only", "{{dw.add_(term) -> dw}} if first"),
    ("any layout taken for contiguous",
     "x, weight, t = x.contiguous(), weight.contiguous(), {{t.contiguous() -> t}}"),
    ("the backward forgets what the forward expected", "dloss{{ / loss_scale -> }}"),
    ("the backward takes any gradient for the expected one",
     "if {{dloss is not loss_scale -> loss_scale is None}}:"),
]  # fmt: skip

GELU: list[Bug] = [
    ("another constant", "(1.0 + {{0.044715 -> 0.04471}} * z * z)"),
    ("another constant in the slope", "{{0.134145 -> 0.044715}}"),
    ("dbias of the last rows only", "dbias {{+= -> =}} dx"),
    ("bias forgotten in the backward", "            z += {{bias -> 0 * bias}}\n"),
    ("partials not all summed", "{{dbias.sum -> dbias[:1].sum}}(0)"),
    ("rows past the end are written", "z * s, mask={{mask -> cols < N}})"),
    ("dy taken for contiguous", "dy_ptr + rows * {{dy_strides[0] -> N}}"),
    ("slope without its sign", "{{tl.where(u2 >= 0.0, 1.0, e) -> 1.0}} * r"),
    ("rows in int32", "{{tl.cast(row_tile, tl.int64) -> row_tile}} * BLOCK_M"),
    ("two programs write one partial", "tl.cast({{part -> 0}}, tl.int64) * N"),
]  # fmt: skip
