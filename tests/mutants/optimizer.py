"""The bugs of the optimizer's ops: see `bugs`."""

from tests.mutants.rows import Bug

UNSCALE: list[Bug] = [
    ("another tensor's program", "mine = program >= firsts[i]", "mine = program > firsts[i]"),
    ("a size of the tensor before", "size = tl.where(mine, sizes[i], size)", "size = size"),
    ("offsets from the launch's start", "tl.cast(program - first,", "tl.cast(program,"),
    ("narrow and wide confused", "mask & narrow, dtype", "mask & (not narrow), dtype"),
    ("partial sums beyond the first block lost", "total += tl.load(", "total = tl.load("),
    (
        "the scale stays in the norm",
        "tl.sqrt_rn(tl.sum(total, 0)) / scale",
        "tl.sqrt_rn(tl.sum(total, 0))",
    ),
    ("small gradients are blown up", "tl.where(larger > 1.0, larger, 1.0)", "larger"),
    ("the scale stays in the gradients", "scale * tl.where(larger", "tl.where(larger"),
    ("NaN counts as good", 'good = norm < float("inf")', 'good = norm != float("inf")'),
    ("an overflow counts as a step", "before + tl.where(good, 1.0, 0.0)", "before + 1.0"),
    ("the scale has no bounds", "tl.minimum(tl.maximum(scale, 1.0), 16777216.0)", "scale"),
    ("calm goes on after an overflow", "tl.load(good_ptr) + 1, 0)", "tl.load(good_ptr) + 1, 1)"),
]

ADAMW: list[Bug] = [
    (
        "an overflow is applied",
        "tl.load(unscaled_ptr + 2) == 0.0",
        "tl.load(unscaled_ptr + 2) < 2.0",
    ),
    ("gradients are not divided", "NARROW < N, dtype) / divisor", "NARROW < N, dtype)"),
    (
        "the decay of the first tensor for all",
        "decay = tl.where(mine, decays[i], decay)",
        "decay = decay",
    ),
    ("the step of the first tensor for all", "index = tl.where(mine, i, index)", "index = 0 * i"),
    ("decay is not times lr", "p -= lr * decay * p", "p -= decay * p"),
    ("moments are swapped", "m = beta1 * load(m_at", "m = beta1 * load(v_at"),
    ("no correction of the first moment", "lr / _correction(t, log1) * m", "lr * m"),
    ("no correction of the second moment", "tl.sqrt_rn(_correction(t, log2))", "1.0"),
    (
        "the correction is a difference",
        "tl.where(x > -0.5, -x * series,",
        "tl.where(x > 0.5, -x * series,",
    ),
    ("eps under the root", "tl.sqrt_rn(v) /", "tl.sqrt_rn(v + eps) /"),
    ("copies are those of every weight", "p, mask & copied,", "p, mask,"),
    (
        "no copy is written",
        "        if COPIES > 0:\n            _store(",
        "        if COPIES < 0:\n            _store(",
    ),
    ("later launches read the first steps", "steps[a:]", "steps"),
]
