"""`irongpt compare` finds each bug of a candidate, and reports no error of a correct one."""

import inspect
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import assert_refused
from irongpt_kernels import eager, tolerance
from irongpt_kernels.op_inputs import RowShape
from irongpt_kernels.op_specs import OPTIMIZERS, SPECS, TOKEN
from irongpt_kernels.runtime import interpreter, launch
from numerics import DEVICE, OPS, each_dtype
from triton.runtime.interpreter import InterpreterBuilder

from irongpt import ops
from irongpt.compare import model, table
from irongpt.compare.command import compare, execution
from irongpt.compare.model import CHECKED_STEPS, Curve
from irongpt.compare.ops import (
    SMALL,
    SMALL_ROWS,
    VOCABULARIES,
    Row,
    all_cases,
    cases,
    compare_case,
    make_rows,
    vocabulary_cases,
)
from irongpt.errors import UserError

CPU = torch.device("cpu")
AT_LARGE_VOCABULARIES = ("cross_entropy", "linear_cross_entropy", "norm_linear")
AT_LARGE_VOCABULARIES += ("embed_layer_norm", "embed_tokens")
TINY = RowShape(1, 2, 17, 16, 21, L=1, M=5, N=20)


def nudge(x: torch.Tensor) -> torch.Tensor:
    """The identity, with a gradient that is 1e-2 too large."""
    y = x.clone()
    y.register_hook(lambda dx: dx + 1e-2)
    return y


def candidate(**wrong) -> SimpleNamespace:
    """Eager, but for the ops that are given."""
    names = [name for spec in SPECS.values() for name in spec.names]
    return SimpleNamespace(**{name: getattr(eager, name) for name in names} | wrong)


def changed(op: str, **changes) -> SimpleNamespace:
    """Eager, but for arguments of one op, which the functions change."""
    function = getattr(eager, op)

    def wrong(*args, **options):
        given = inspect.signature(function).bind(*args, **options).arguments
        return function(**given | {name: f(given.get(name)) for name, f in changes.items()})

    return candidate(**{op: wrong})


def one_gradient_with_another_seed(q, k, v, *, seed=None, **options):
    """Attention whose d k has another dropout mask."""

    def op(q, k, v, seed):
        return eager.causal_attention(q, k, v, seed=seed, **options)

    if not options["dropout_p"]:
        return op(q, k, v, seed)
    through_k = op(q.detach(), k, v.detach(), seed ^ 1)
    return op(q, k.detach(), v, seed) + through_k - through_k.detach()


def scaled(op: str, factor: Callable[[], float]) -> SimpleNamespace:
    return candidate(**{op: lambda **inputs: getattr(eager, op)(**inputs) * factor()})


NUDGED = changed("layer_norm", weight=nudge)
OTHER_ELEMENTS = changed("causal_attention", seed=lambda seed: seed and seed + 1)
OTHER_ROWS = changed("dropout_add_layer_norm", seed=lambda seed: seed and seed + (1 << 32))
ONE_NAN = scaled("cross_entropy", lambda: float("nan"))
NOT_REPEATABLE = scaled("gelu", Mock(side_effect=itertools.cycle([1, 1 + 2.0**-23])))
RAISING = scaled("softmax", Mock(side_effect=RuntimeError("out of registers\nand" + " more" * 50)))


def compare_injected(monkeypatch, capsys, module, only: str = "", **files) -> tuple[int, str]:
    """Runs the command, with all ops or one, without the comparison of models, which has its own
    tests."""
    chosen = [case for case in all_cases(False, True) if only in ("", case.op)]
    monkeypatch.setattr("irongpt.compare.command.all_cases", lambda *args: chosen)
    monkeypatch.setattr(ops, "load", lambda name, device: module)
    monkeypatch.setattr("irongpt.compare.command.compare_model", lambda *_: ([], [], []))
    capsys.readouterr()
    code = compare("cpu", ["float32"], files.get("json_file"), files.get("plot"))
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "op", "found"),
    [
        (NUDGED, "layer_norm", "model, float32, gradient d weight"),
        (candidate(causal_attention=one_gradient_with_another_seed), "causal_attention",
         "model, float32, dropout mask\n     other elements than eager's are dropped in d k\n"),
        (NOT_REPEATABLE, "gelu", "ragged, float32, repeatable"),
        (RAISING, "softmax", "model, float32, runs\n     RuntimeError: out of registers and"),
        (ONE_NAN, "cross_entropy", "model, float32, output out"),
        (ONE_NAN, "cross_entropy", "V=4,096, float32, output out"),
        (changed("sample_tokens", seed=lambda seed: seed + 1), "sample_tokens",
         "V=50,304, float32, integers"),
        (changed("adamw", weight_decays=lambda decays: [0.0] * len(decays)), "adamw",
         "model, float32, output matrices.params"),
        (changed("norm_linear", weight=lambda w: w.roll(int(len(w) > 50_000), 0)), "norm_linear",
         "V=50,304, float32, output out"),
    ],
)  # fmt: skip
def test_each_bug_is_found_and_named(monkeypatch, capsys, module, op, found):
    code, out = compare_injected(monkeypatch, capsys, module, op)
    assert code == 1
    assert f"FAIL {op}, {found}" in out
    assert out.splitlines()[-1].startswith("FAIL: ")
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("module", "op", "output", "places"),
    [
        (OTHER_ELEMENTS, "causal_attention", "out", "d k, d q, d v, out"),
        (OTHER_ROWS, "dropout_add_layer_norm", "total", "total, d branch"),
    ],
)
def test_a_wrong_mask_is_found_in_every_shape(monkeypatch, capsys, module, op, output, places):
    _, out = compare_injected(monkeypatch, capsys, module, op)
    assert f"FAIL {op}, model, float32, output {output}\n" in out  # an error, too
    for shape in SMALL:
        check = f"FAIL {op}, {shape}, float32, dropout mask\n     other elements than eager's are"
        assert f"{check} dropped in {places}\n" in out


def test_eager_itself_passes_with_its_dropout(monkeypatch, capsys):
    code, out = compare_injected(monkeypatch, capsys, candidate())
    assert code == 0
    assert "FAIL" not in out
    assert "dropout mask 6/6" in out  # two ops, three shapes


def test_a_failure_is_in_the_files_too(monkeypatch, capsys, tmp_path):
    json_file, plot = tmp_path / "c.json", tmp_path / "c.png"
    compare_injected(monkeypatch, capsys, NUDGED, json_file=json_file, plot=plot)
    values = json.loads(json_file.read_text())
    assert values["ok"] is False
    bad = {(r["op"], r["tensor"]) for r in values["rows"] if not r["ok"]}
    assert bad == {("layer_norm", "d weight")}
    worst = next(r["worst"] for r in values["rows"] if not r["ok"])
    assert worst["candidate"] - worst["float64"] == pytest.approx(1e-2, rel=1e-3)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_comparison_that_is_stopped_keeps_the_groups_before(monkeypatch, capsys, tmp_path):
    json_file, seen = tmp_path / "c.json", []

    def compare_until_stopped(case, *rest):
        seen.append((case.op, case.shape))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return compare_case(case, *rest)

    monkeypatch.setattr("irongpt.compare.command.compare_case", compare_until_stopped)
    with pytest.raises(KeyboardInterrupt):
        compare_injected(monkeypatch, capsys, candidate(), json_file=json_file)
    values = json.loads(json_file.read_text())
    assert {(r["op"], r["shape"]) for r in values["rows"]} == set(seen[:3])
    assert {shape for _, shape in seen} == {"model"}  # which comes first
    groups = len(all_cases(False, True)) + 1  # and the model
    assert (values["groups"], values["of_groups"]) == (3, groups)


def test_builtin_passes_and_its_files_are_complete(cli):
    flags = "--device cpu --dtype float32 --ops builtin --json c.json --plot c.png"
    result = cli("compare", *flags.split())
    assert "FAIL" not in result.out
    assert max(map(len, result.out.splitlines())) <= 100
    assert result.out.splitlines()[-1].startswith("ok: ")
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")
    values = json.loads(Path("c.json").read_text())
    assert values["ok"] is True
    assert values["groups"] == values["of_groups"]
    assert {(r["op"], r["shape"]) for r in values["rows"]} == {
        *((op, shape) for op in OPS for shape in SMALL),
        *((spec.name, "model") for spec in (*TOKEN, *OPTIMIZERS) if spec.name != "sample_tokens"),
        *((op, f"V={V:,}") for op in AT_LARGE_VOCABULARIES for V in VOCABULARIES),
        ("model", "one step"),
    }
    tensors = {r["tensor"] for r in values["rows"] if r["op"] == "model"}
    assert {"logits", "d wte.weight", "d wpe.weight", "d blocks.1.mlp.proj.weight"} <= tensors
    assert len(tensors) == 1 + 2 + 2 * 6 + 1
    for row in values["rows"]:
        assert set(row["errors"]) == {"max", "rms"}
        assert set(row["errors"]["max"]) == {"candidate", "eager", "bound", "ratio"}
        assert set(row["worst"]) == {"index", "candidate", "eager", "float64"}
    (curve,) = values["training"]
    assert len(curve["candidate"]) == len(curve["eager"]) == len(curve["difference"]) == 20
    assert curve["eager"][-1] < curve["eager"][0] - 0.5


def test_the_model_of_a_candidate_with_a_wrong_gradient_fails():
    s = model.setting(full=False, with_dropout=True)
    nudged = changed("embed_layer_norm", weight=nudge)
    rows = model.compare_step(s, nudged, torch.float32, CPU)
    assert {r.tensor for r in rows if not r.ok} == {"d blocks.0.ln_1.weight"}
    curve = model.train_both(s, OTHER_ROWS, torch.float32, CPU)
    assert not curve.check().ok
    assert model.train_both(s, candidate(), torch.float32, CPU).check().ok


@pytest.mark.parametrize("shape", SMALL)
@each_dtype
def test_the_kernels_pass(shape, dtype):
    device = torch.device(DEVICE)
    fused = ops.load("fused", device)
    for case in cases(shape, TINY, with_dropout=True):
        rows, checks = compare_case(case, fused, dtype, device, with_dropout=True)
        assert rows or case.op == "sample_tokens"
        assert [x for x in (*rows, *checks) if not x.ok] == []


def test_the_kernels_pass_at_large_vocabularies():
    device = torch.device(DEVICE)
    fused = ops.load("fused", device)
    for case in vocabulary_cases(SMALL_ROWS):
        rows, checks = compare_case(case, fused, torch.float16, device, with_dropout=True)
        assert [x for x in (*rows, *checks) if not x.ok] == []
        gradients = len(case.inputs()) - 1 if case.spec.differentiable else 0  # of all but integers
        assert len(rows) + len(checks) == max(1, len(case.spec.outputs)) + gradients + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device cpu --dtype bfloat16", "bfloat16 needs a GPU"),
        ("--device cpu --ops builtin --json missing/c.json", "its folder does not exist"),
        ("--device cpu --ops builtin --plot .", ". is a folder"),
        ("--device gpu", "--device must be"),
        ("--arch sm_61", "--arch must be sm_75, sm_80, sm_90, got 'sm_61'"),
        ("--arch sm_75 --ops builtin", "--ops builtin has none"),
        ("--arch sm_75 --device cuda", "not on --device cuda"),
        ("--arch sm_75", "unset TRITON_INTERPRET"),
        ("--device cpu", "TRITON_INTERPRET=1"),
    ],
)
def test_mistakes(cli, monkeypatch, arguments, message):
    monkeypatch.setattr(launch, "INTERPRETED", "--arch" in arguments)
    assert_refused(cli, message, "compare", *arguments.split())


@pytest.mark.skipif(not launch.INTERPRETED, reason="is about the interpreter")
def test_interpreted_matmuls_have_one_order_of_sums(monkeypatch):
    """Whatever the BLAS of NumPy does with a transposed product."""
    monkeypatch.setattr(InterpreterBuilder, "create_dot", interpreter.PLAIN)
    with execution(None, "cpu", "fused"):
        assert InterpreterBuilder.create_dot is not interpreter.PLAIN
    assert InterpreterBuilder.create_dot is interpreter.PLAIN


def test_a_file_that_cannot_be_written_is_a_mistake(monkeypatch, capsys, tmp_path):
    refuse = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr("irongpt.files.replace_file", refuse)
    with pytest.raises(UserError, match=r"cannot write .*c\.json: Permission denied"):
        compare_injected(monkeypatch, capsys, candidate(), json_file=tmp_path / "c.json")


def test_strided_cases_give_an_op_strided_tensors():
    seen = {}

    def spy(name):
        def op(**inputs):
            x = next(iter(inputs.values()))
            assert name == "causal_attention" or not x.is_contiguous()
            out = getattr(eager, name)(**inputs)
            views = tuple(y.view_as(y) for y in (out if isinstance(out, tuple) else [out]))
            for view in views:
                view.register_hook(lambda g: seen.setdefault(name, []).append(g.is_contiguous()))
            return views

        return op

    module = SimpleNamespace(**{name: spy(name) for name in OPS})
    for case in cases("strided", TINY, with_dropout=False):
        compare_case(case, module, torch.float32, CPU, with_dropout=False)
    del seen["cross_entropy"], seen["linear_cross_entropy"]  # their gradient is one number
    assert len(seen) == 5
    assert not any(map(any, seen.values()))


def test_the_tolerance_is_that_of_the_design():
    one = torch.ones(4, dtype=torch.float64)
    baseline, floor = (one + 2.0**-20).float(), 2.0**-23
    for factor in (tolerance.OUTPUTS, tolerance.GRADIENTS):
        allowed = factor * 2.0**-20 + floor
        found = tolerance.errors(factor, (one + allowed).float(), baseline, one)
        assert all(e.ok and e.bound == pytest.approx(allowed) for e in found.values())
        too_far = (one + allowed + 2.0**-23).float()
        assert not any(e.ok for e in tolerance.errors(factor, too_far, baseline, one).values())
    assert (tolerance.OUTPUTS, tolerance.GRADIENTS) == (2, 3)


def row_of(name, *results) -> Row:
    (row,) = make_rows("op", "model", "", "float32", *({name: x} for x in results))
    return row


def test_one_norm_that_exceeds_the_tolerance_is_enough():
    """Each element has the error of eager's worst one: only the root mean square exceeds it."""
    want = torch.ones(100, dtype=torch.float64)
    baseline = want.float()
    baseline[0] += 2.0**-10
    x = (want + 2.0**-10).float()
    row = row_of("out", x, baseline, want)
    assert row.errors["max"].ok
    assert not row.ok
    assert row.errors["rms"].ratio == pytest.approx(10)


@pytest.mark.parametrize("tensor", ["out", "d x"])
def test_the_worst_element_and_the_factor_of_a_tensor(tensor):
    want = torch.zeros(3, 4, dtype=torch.float64)
    baseline, x = want.float(), want.float()
    baseline[0, 0], x[0, 0], x[2, 1] = 0.5, 0.25, -1.25
    row = row_of(tensor, x, baseline, want)
    assert row.worst == dict(index=[2, 1], candidate=-1.25, eager=0, float64=0)
    assert row.errors["max"].ok is (tensor == "d x")  # 2.5 times eager's


def test_the_table_shows_the_block_nearest_to_its_tolerance():
    want = torch.ones(2, dtype=torch.float64)

    def row(block, steps):
        x, base = ((want + n * 2.0**-22).float() for n in (steps, 1))
        return row_of(f"d blocks.{block}.ln_1.weight", x, base, want)

    text = table.group("model", [row(0, 1), row(1, 3), row(2, 2)], [])
    assert "blocks.1." in text
    assert len(text.strip().splitlines()) == 2


@pytest.mark.parametrize(
    ("dtype", "step", "loss", "ok"),
    [
        ("float32", 3, 2.0, True),
        ("float32", 3, 2.0001, False),
        ("float32", CHECKED_STEPS + 1, 2.0001, True),  # by now rounding has grown
        ("float16", 3, 2.0001, True),
        ("float16", 3, float("nan"), False),
        ("float32", CHECKED_STEPS + 1, float("inf"), False),
    ],
)
def test_training_curves_have_to_agree_before_rounding_grows(dtype, step, loss, ok):
    losses = [2.0] * (CHECKED_STEPS + 2)
    assert Curve(dtype, [*losses[:step], loss, *losses[step + 1 :]], losses).check().ok is ok


def test_the_difference_of_the_first_steps_is_printed_if_there_are_more():
    losses = [2.0] * CHECKED_STEPS
    line = table.training(Curve("float32", losses, losses))
    assert line.endswith("steps, loss 2.000 to 2.000; relative difference 0.0e+00")
    assert table.training(Curve("float32", [*losses, 1.0], [*losses, 2.0])).endswith(
        f"relative difference 5.0e-01 (first {CHECKED_STEPS}: 0.0e+00)"
    )
