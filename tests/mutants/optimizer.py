"""The bugs of the optimizer's ops; see `run`."""

from tests.mutants.rows import Bug

GRAD_NORM: list[Bug] = [
    ("another tensor's program", "mine = program {{>= -> >}} firsts[i]"),
    ("a size of the tensor before", "size = {{tl.where(mine, sizes[i], size) -> size}}"),
    ("offsets from the launch's start", "tl.cast(program{{ - first -> }},"),
    ("narrow and wide confused", "mask & {{is_16bit -> (not is_16bit)}}, dtype"),
    ("partial sums beyond the first block lost", "total {{+= -> =}} tl.load("),
    ("the first shard alone", "for shard in range(1, {{shards -> 1}}):"),
    ("shards beyond the sum", "mask = offsets {{< -> <=}} size\n    g = "),
    ("the scale stays in the norm",
     "{{tl.div_rn(tl.sqrt_rn(tl.sum(total, 0)), scale) -> tl.sqrt_rn(tl.sum(total, 0))}}"),
    ("small gradients are scaled up", "{{tl.where(larger > 1.0, larger, 1.0) -> larger}}"),
    ("the scale stays in the gradients", "{{scale * tl.where -> tl.where}}(larger"),
    ("NaN counts as good", 'finite = norm {{< -> !=}} float("inf")'),
    ("an overflow counts as a step", "before + {{tl.where(finite, 1.0, 0.0) -> 1.0}}"),
    ("the scale has no bounds", "{{tl.minimum(tl.maximum(scale, 1.0), 16777216.0) -> scale}}"),
    ("growth_interval goes on after an overflow", "tl.load(growth_tracker_ptr) + 1, {{0 -> 1}})"),
]  # fmt: skip

ADAMW: list[Bug] = [
    ("an overflow is applied", "tl.load(stats_ptr + 2) {{== 0.0 -> < 2.0}}"),
    ("gradients are not divided", "{{        g = tl.div_rn(g, grad_scale)\n -> }}"),
    ("the decay of the first tensor for all",
     "decay = {{tl.where(mine, decays[i], decay) -> decay}}"),
    ("the step of the first tensor for all", "index = {{tl.where(mine, i, index) -> 0 * i}}"),
    ("decay is not times lr", "p -= {{lr * decay -> decay}} * p"),
    ("moments are swapped", "m = beta1 * load({{m_at -> v_at}}"),
    ("no correction of the first moment", "{{tl.div_rn(lr, _correction(t, log_beta1)) -> lr}}"),
    ("no correction of the second moment", "{{tl.sqrt_rn(_correction(t, log_beta2)) -> 1.0}}"),
    ("the correction is a difference", "tl.where(x > {{-0.5 -> 0.5}}, -x * series,"),
    ("eps under the root", "tl.sqrt_rn({{v -> v + eps}}),"),
    ("copies are those of every weight", "p, mask{{ & has_copy -> }},"),
    ("no copy is written", "        if N_COPIES {{> -> <}} 0:\n            _store("),
    ("later launches read the first steps", "{{state_steps[part] -> state_steps}}"),
]  # fmt: skip

MUON: list[Bug] = [
    ("every matrix has the gradient of the first",
     "address = tl.where(i {{== k -> < 0}}, pointers"),
    ("the mask takes one more", "return offsets, offsets {{< -> <=}} size"),
    ("offsets of the first block for all", "{{tl.cast(tl.program_id(0), tl.int64) * BLOCK -> 0}}"),
    ("momentum of the first matrix for all",
     "momentum_ptr += {{tl.cast(matrix, tl.int64) * size -> 0 * matrix}}"),
    ("momentum after an overflow",
     "stats_ptr + 2) {{== 0.0 -> < 2.0}}:\n"
     "        dtype: tl.constexpr = grads[0].dtype.element_ty\n        address"),
    ("gradients are not divided in the momentum",
     "{{tl.div_rn(load(address, offsets, mask, dtype), grad_scale) -> "
     "load(address, offsets, mask, dtype)}}"),
    ("gradients are not divided in what is ahead",
     "{{        g = tl.div_rn(g, tl.load(stats_ptr + 1))\n -> }}"),
    ("no look ahead in the norm", "a = {{beta * m + one_minus_beta * g -> m}}"),
    ("no look ahead",
     "a = {{beta * tl.load(momentum_ptr + at, mask=mask, other=0.0) + one_minus_beta * g -> "
     "tl.load(momentum_ptr + at, mask=mask, other=0.0)}}"),
    ("partial sums of the first matrix", "sums_ptr{{ + matrix * parts -> }}"),
    ("blocks beyond the first of a program lost",
     "{{tl.cdiv(size, BLOCK) -> programs}}, programs)"),
    ("squares of the last block alone", "squares {{+= -> =}} a * a"),
    ("sums of all where there are fewer", "mask=part < {{parts -> PARTS}}"),
    ("the square of the norm", "{{tl.sqrt_rn(tl.sum(sums, 0)) -> tl.sum(sums, 0)}}"),
    ("a matrix of zeros is divided by zero", "{{+ TINY -> }})"),
    ("infinity after an overflow",
     'y = {{tl.zeros((BLOCK,), tl.float32) -> tl.full((BLOCK,), float("inf"), tl.float32)}}'),
    ("an update after an overflow", "stats_ptr + 2) {{== 0.0 -> < 2.0}}:\n        lr,"),
    ("decay is not times lr", "p - {{lr * decay -> decay}} * p -"),
    ("the update decays too",
     "p = {{p - lr * decay * p - lr * scale * u -> (p - lr * scale * u) * (1 - lr * decay)}}"),
    ("no copy is written", "{{if -> if not}} COPY:"),
    ("the copy is what was before", "{{p.to -> (p + lr * scale * u).to}}(dtype), mask=mask)"),
    ("later launches read the first momentum", "{{momentum[part] -> momentum}}, sums[part]"),
    ("later launches write the first result", "{{y[part] -> y}}, parts, *numbers"),
    ("later launches read the first updates", "some, low, {{update[part] -> update}}"),
    ("updates of another layout as they are", "update = {{update.contiguous() -> update}}"),
    ("gradients of another layout as they are", "{{[aligned(g) for g in grads] -> list(grads)}}"),
]  # fmt: skip
