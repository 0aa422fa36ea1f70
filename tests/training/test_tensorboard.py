"""`irongpt train --tensorboard`, read by TensorBoard itself."""

import json
from pathlib import Path

import pytest
from conftest import TINY, assert_refused

from irongpt.runs import tensorboard

pytest.importorskip("tensorboard")


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()
    assert tags["tensors"] == ["sample/text_summary"]
    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("sample/text_summary")]
    found: dict = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    return found | {"sample": texts}


def expected(run: Path) -> dict[str, list]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict = {
        tag: [
            (r["step"], pytest.approx(r[key], rel=1e-6)) for r in records if r.get(key) is not None
        ]
        for tag, key in tensorboard.SCALARS.items()
    }
    samples = [r["sample"] for r in records if r.get("sample")]
    return found | {"sample": ["    " + text.replace("\n", "\n    ") for text in samples]}


def test_the_curves_are_those_of_the_metrics_and_resume_continues_them(cli, tmp_path) -> None:
    run = tmp_path / "run"
    cli("train", *TINY, "--out", run, "--iters", 20, "--eval-every", 20, "--tensorboard")
    assert curves(run) == expected(run)
    cli("train", "--resume", run, "--iters", 40)  # the flag is remembered
    found = curves(run)
    assert found == expected(run)
    assert [step for step, _ in found["loss/training"]] == [10, 20, 30, 40]
    assert [step for step, _ in found["loss/validation"]] == [20, 40]
    assert len(list(run.glob("events.out.tfevents.*"))) == 1


def test_a_run_without_events_gets_all_of_them_later(cli, tmp_path, run) -> None:
    assert not list((tmp_path / run).glob("events*"))
    cli("train", "--resume", run, "--iters", 40, "--tensorboard")
    assert curves(tmp_path / run) == expected(tmp_path / run)


def test_without_the_package_a_line_says_what_to_install(cli, monkeypatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    message = "needs the package tensorboard: pip install tensorboard"
    assert_refused(cli, message, "train", *TINY, "--out", "run", "--tensorboard")


def test_events_that_cannot_be_written_do_not_end_the_training(cli, tmp_path, monkeypatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    result = cli("train", *TINY, "--out", "run", "--tensorboard")
    assert result.out.count("warning   TensorBoard's event file failed, training continues") == 1
