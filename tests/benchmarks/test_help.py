"""`--help` of every benchmark: how to call it, what each option is, and the allowed names."""

import argparse
import importlib

import pytest

NAMES = "decode ledger ops report scaling suite tokenizers train_runs training vs_nanogpt".split()
PACKAGES = ("ops", "report", "suite", "training")


@pytest.mark.parametrize("name", NAMES)
def test_the_help_says_how_to_call_it_and_what_each_option_is(name: str, monkeypatch) -> None:
    module = importlib.import_module(f"benchmarks.{name}{'.__main__' * (name in PACKAGES)}")
    parsers: list[argparse.ArgumentParser] = []

    def parse(self: argparse.ArgumentParser, *_: object) -> None:
        parsers.append(self)
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(InterruptedError):
        module.main([])
    (parser,) = parsers
    assert parser.prog.endswith(f" -m benchmarks.{name}")
    shown = parser.format_help()
    assert module.__doc__.strip() in shown  # with its lines as they are
    for action in parser._actions:
        assert len((action.help or "").split("[")[0].split()) >= 2
        listed = action.help if action.metavar else shown
        assert all(str(choice) in listed for choice in action.choices or ())
