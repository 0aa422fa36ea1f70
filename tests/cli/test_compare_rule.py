"""What `irongpt compare` measures and shows, on tensors and losses made by hand."""

import pytest
import torch
from irongpt_kernels import tolerance

from irongpt.compare import ops, table
from irongpt.compare.model import JUDGED_STEPS, Curve


def test_the_rule_is_what_the_design_says():
    one = torch.ones(4, dtype=torch.float64)
    baseline, floor = (one + 2.0**-20).float(), 2.0**-23
    for factor in (tolerance.OUTPUTS, tolerance.GRADIENTS):
        allowed = factor * 2.0**-20 + floor
        found = tolerance.errors(factor, (one + allowed).float(), baseline, one)
        assert all(e.ok and e.bound == pytest.approx(allowed) for e in found.values())
        too_far = (one + allowed + 2.0**-23).float()
        assert not any(e.ok for e in tolerance.errors(factor, too_far, baseline, one).values())
    assert (tolerance.OUTPUTS, tolerance.GRADIENTS) == (2, 3)


def test_one_norm_beyond_the_rule_is_enough():
    """Every element as wrong as eager's worst: the maximum is well, the root mean square is not."""
    want = torch.ones(100, dtype=torch.float64)
    baseline = want.float()
    baseline[0] += 2.0**-10
    x = (want + 2.0**-10).float()
    row = ops.make_row("gelu", "model", "", "float32", "out", x, baseline, want)
    assert row.errors["max"].ok
    assert not row.ok
    assert row.errors["rms"].ratio == pytest.approx(10)


@pytest.mark.parametrize("tensor", ["out", "d x"])
def test_the_worst_element_and_the_kind_of_a_tensor(tensor):
    want = torch.zeros(3, 4, dtype=torch.float64)
    baseline, x = want.float(), want.float()
    baseline[0, 0], x[0, 0], x[2, 1] = 0.5, 0.25, -1.25
    row = ops.make_row("gelu", "model", "", "float32", tensor, x, baseline, want)
    assert (row.index, row.candidate, row.eager, row.float64) == ([2, 1], -1.25, 0, 0)
    assert row.errors["max"].ok is (tensor == "d x")  # 2.5 times eager's


def test_the_table_shows_the_block_nearest_to_its_limit():
    want = torch.ones(2, dtype=torch.float64)

    def row(block, steps):
        x = (want + steps * 2.0**-22).float()
        base = (want + 2.0**-22).float()
        name = f"d blocks.{block}.ln_1.weight"
        return ops.make_row("model", "one step", "", "float32", name, x, base, want)

    text = table.group("model", [row(0, 1), row(1, 3), row(2, 2)], [])
    assert "blocks.1." in text
    assert len(text.strip().splitlines()) == 2


@pytest.mark.parametrize(
    ("dtype", "step", "loss", "ok"),
    [
        ("float32", 3, 2.0, True),
        ("float32", 3, 2.0001, False),
        ("float32", JUDGED_STEPS + 1, 2.0001, True),  # rounding grows; shown and not judged
        ("float16", 3, 2.0001, True),
        ("float16", 3, float("nan"), False),
        ("float32", JUDGED_STEPS + 1, float("inf"), False),
    ],
)
def test_training_curves_have_to_agree_as_long_as_rounding_lets_them(dtype, step, loss, ok):
    losses = [2.0] * (JUDGED_STEPS + 2)
    assert Curve(dtype, [*losses[:step], loss, *losses[step + 1 :]], losses).check().ok is ok
