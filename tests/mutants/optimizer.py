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
    (
        "growth_interval goes on after an overflow",
        "tl.load(good_ptr) + 1, 0)",
        "tl.load(good_ptr) + 1, 1)",
    ),
]

ADAMW: list[Bug] = [
    (
        "an overflow is applied",
        "tl.load(unscaled_ptr + 2) == 0.0",
        "tl.load(unscaled_ptr + 2) < 2.0",
    ),
    ("gradients are not divided", "NARROW < N, dtype) / grad_scale", "NARROW < N, dtype)"),
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

MUON: list[Bug] = [
    (
        "every matrix has the gradient of the first",
        "address = tl.where(i == k, pointers",
        "address = tl.where(i < 0, pointers",
    ),
    (
        "the mask takes one more",
        "return offsets, offsets < size",
        "return offsets, offsets <= size",
    ),
    ("offsets of the first block for all", "tl.cast(tl.program_id(0), tl.int64) * BLOCK", "0"),
    (
        "momentum of the first matrix for all",
        "momentum_ptr += tl.cast(matrix, tl.int64) * size",
        "momentum_ptr += 0 * matrix",
    ),
    (
        "momentum after an overflow",
        "unscaled_ptr + 2) == 0.0:\n"
        "        dtype: tl.constexpr = grads[0].dtype.element_ty\n        address",
        "unscaled_ptr + 2) < 2.0:\n"
        "        dtype: tl.constexpr = grads[0].dtype.element_ty\n        address",
    ),
    (
        "gradients are not divided in the momentum",
        "mask, dtype) / grad_scale",
        "mask, dtype)",
    ),
    (
        "gradients are not divided in what is ahead",
        "mask, dtype) / tl.load(unscaled_ptr + 1)",
        "mask, dtype)",
    ),
    ("no look ahead in the norm", "ahead = beta * m + rest * g", "ahead = m"),
    (
        "no look ahead",
        "ahead = beta * tl.load(momentum_ptr + at, mask=mask, other=0.0) + rest * g",
        "ahead = tl.load(momentum_ptr + at, mask=mask, other=0.0)",
    ),
    (
        "partial sums of the first matrix",
        "sums_ptr + matrix * parts",
        "sums_ptr",
    ),
    (
        "blocks beyond the first of a program lost",
        "tl.cdiv(size, BLOCK), programs)",
        "programs, programs)",
    ),
    ("squares of the last block alone", "squares += ahead * ahead", "squares = ahead * ahead"),
    ("sums of all where there are fewer", "mask=part < parts", "mask=part < PARTS"),
    ("the square of the norm", "tl.sqrt_rn(tl.sum(sums, 0))", "tl.sum(sums, 0)"),
    ("a matrix of zeros is divided by zero", "+ TINY)", ")"),
    (
        "infinity after an overflow",
        "y = tl.zeros((BLOCK,), tl.float32)",
        'y = tl.full((BLOCK,), float("inf"), tl.float32)',
    ),
    (
        "an update after an overflow",
        "unscaled_ptr + 2) == 0.0:\n        lr,",
        "unscaled_ptr + 2) < 2.0:\n        lr,",
    ),
    ("decay is not times lr", "p - lr * decay * p -", "p - decay * p -"),
    (
        "the update decays too",
        "p = p - lr * decay * p - lr * scale * u",
        "p = (p - lr * scale * u) * (1 - lr * decay)",
    ),
    ("no copy is written", "if COPIES > 0:", "if COPIES < 0:"),
    (
        "the copy is what was before",
        "p.to(dtype), mask=mask)",
        "(p + lr * scale * u).to(dtype), mask=mask)",
    ),
    (
        "later launches read the first momentum",
        "momentum[a:b], sums[a:b]",
        "momentum, sums[a:b]",
    ),
    ("later launches write the first result", "y[a:b], parts, *numbers", "y, parts, *numbers"),
    ("later launches read the first updates", "some, low, update[a:b]", "some, low, update"),
    ("updates of another layout as they are", "update = update.contiguous()", "update = update"),
    ("gradients of another layout as they are", "[packed(g) for g in grads]", "list(grads)"),
]
