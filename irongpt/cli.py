"""The command line: its flags come from the dataclasses of `config`."""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn

from irongpt import __version__
from irongpt.config import PRESETS, GPTConfig, SampleConfig, TrainConfig, flag
from irongpt.errors import DivergenceError, UserError


class Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code. A mistake is one line on stderr and code 2."""
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        given = vars(build_parser().parse_args(argv))
        return int(given.pop("run_command")(given))
    except (UserError, DivergenceError) as e:
        print("irongpt: error:", " ".join(str(e).split()), file=sys.stderr)
        return 2 if isinstance(e, UserError) else 1
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and not re.search(
            "out of memory|allocate memory", str(e)
        ):
            raise
        hint = "a smaller --batch-size with a larger --grad-accum needs less"
        print(f"irongpt: error: the memory does not suffice: {hint}", file=sys.stderr)
        return 2


def build_parser() -> Parser:
    parser = Parser(prog="irongpt", description="A GPT from scratch: train it, sample from it.")
    parser.add_argument("--version", action="version", version=f"irongpt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model, or go on with a run")
    train.set_defaults(run_command=train_command)
    train.add_argument(
        "--preset",
        choices=list(PRESETS),
        default=argparse.SUPPRESS,
        help="model and recipe. "
        + "; ".join(f"{name}: {p.summary}" for name, p in PRESETS.items())
        + " [iron on a GPU, else nano]",
    )
    train.add_argument(
        "--data",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="war-and-peace, python-docs, python-code, or a text file [war-and-peace]",
    )
    where = train.add_mutually_exclusive_group()
    where.add_argument(
        "--out",
        metavar="RUN",
        default=argparse.SUPPRESS,
        help="folder of the new run [runs/TEXT-PRESET]",
    )
    where.add_argument(
        "--resume",
        metavar="RUN",
        default=argparse.SUPPRESS,
        help="go on with this run from its last checkpoint, as if it had never stopped",
    )
    add_options(train, GPTConfig, [p.model for p in PRESETS.values()])
    add_options(train, TrainConfig, [p.train for p in PRESETS.values()])
    train.add_argument(
        "--no-graph",
        action="store_false",
        dest="graph",
        default=argparse.SUPPRESS,
        help="launch the kernels of a step one by one, on a GPU: the same numbers, slower",
    )

    generate = commands.add_parser("generate", help="write text with a trained model")
    generate.set_defaults(run_command=generate_command)
    generate.add_argument("run", metavar="RUN", help="folder of a run")
    prompt = generate.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue [a new line]")
    prompt.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="file with the text to continue, - for standard input; a last line end is dropped",
    )
    add_options(generate, SampleConfig, [])
    generate.add_argument(
        "--checkpoint",
        choices=["best", "last"],
        default="best",
        help="by validation loss, or the newest [best]",
    )
    by_name = {f.name: f for f in fields(TrainConfig)}
    for name in ("ops", "device"):
        add_option(generate, by_name[name], [])
    compare = commands.add_parser("compare", help="hold the kernels against eager PyTorch")
    compare.set_defaults(run_command=compare_command)
    compare.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:N [auto]"
    )
    compare.add_argument(
        "--dtype",
        action="append",
        choices=["float32", "float16", "bfloat16"],
        help="may be given several times [all that the device computes]",
    )
    compare.add_argument(
        "--ops", choices=["fused", "builtin"], default="fused", help="what is compared [fused]"
    )
    compare.add_argument("--json", metavar="FILE", help="writes every number there")
    compare.add_argument("--plot", metavar="FILE", help="draws error ratios and loss curves there")

    doctor = commands.add_parser("doctor", help="what this machine will run, and why")
    doctor.set_defaults(run_command=doctor_command)
    doctor.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:N [auto]"
    )
    doctor.add_argument("--json", metavar="FILE", help="writes the same there")

    tune = commands.add_parser("tune", help="measure the kernels' tiles on this GPU; never needed")
    tune.set_defaults(run_command=tune_command)
    tune.add_argument("--device", default="auto", metavar="NAME", help="cuda or cuda:N [auto]")
    tune.add_argument(
        "--preset", choices=list(PRESETS), default="iron", help="whose shapes are measured [iron]"
    )
    tune.add_argument(
        "--dtype",
        default="auto",
        choices=by_name["dtype"].metadata["choices"],
        help="type of the matrix products [auto: what a training would take]",
    )
    tune.add_argument("--quick", action="store_true", help="one candidate in three, fewer samples")

    for command in (train, generate):
        command.add_argument(
            "--fused", action="store_const", const="fused", dest="ops", default=argparse.SUPPRESS,
            help="short for --ops fused",
        )  # fmt: skip
    return parser


def add_options(parser: Parser, config: type, presets: list[dict[str, Any]]) -> None:
    """A flag for every field that `config.option` made."""
    for f in fields(config):
        if "help" in f.metadata:
            add_option(parser, f, presets)


def add_option(parser: Parser, f: Any, presets: list[dict[str, Any]]) -> None:
    values = [preset.get(f.name, f.default) for preset in presets] or [f.default]
    shown = ["none" if value is None else str(value) for value in values]
    if len(set(shown)) > 1:
        shown = [f"{name} {value}" for name, value in zip(PRESETS, shown, strict=True)]
    kind = f.type.__args__[0] if isinstance(f.type, UnionType) else f.type
    parser.add_argument(
        flag(f.name),
        type=kind,
        choices=f.metadata["choices"],
        default=argparse.SUPPRESS,
        metavar=None if f.metadata["choices"] else {int: "N", float: "X", str: "NAME"}[kind],
        help=f"{f.metadata['help']} [{', '.join(dict.fromkeys(shown))}]".replace("%", "%%"),
    )


def train_command(given: dict[str, Any]) -> int:
    start = time.perf_counter()  # importing torch takes seconds, which are set-up too
    from irongpt.console import Clock, say
    from irongpt.training.start import new_run, resumed_run

    clock = Clock(start)
    if "resume" in given:
        training = resumed_run(Path(given.pop("resume")), given, clock)
    else:
        training = new_run(given, clock)
    clock.parts["set-up"] = clock.total()
    path, trainer = training.run.path, training.trainer
    say(f"run       {path}, from step {trainer.step:,}")
    idle = training.finished()
    stopped_by = training.fit()
    if stopped_by is not None:
        say(f"stopped at step {trainer.step:,} and saved: irongpt train --resume {path} goes on")
    elif idle:
        longer = "a lower --target-loss" if training.reached_target() else "--iters N"
        say(f"nothing to do: the run is finished; {longer} takes it further")
    else:
        say(f"{training.outcome()}; irongpt generate {path} writes with it")
    say(f"time      {clock.summary()}")
    return 0 if stopped_by is None else 128 + stopped_by


def generate_command(given: dict[str, Any]) -> int:
    from irongpt import device as devices
    from irongpt import launch_cache, ops
    from irongpt.generation.sample import generate_batch, printable, start_ids
    from irongpt.training.start import trained_model

    run, checkpoint = Path(given.pop("run")), given.pop("checkpoint")
    prompt, file = given.pop("prompt"), given.pop("prompt_file")
    op_set, device = given.pop("ops", "builtin"), given.pop("device", "auto")
    config = SampleConfig(**given)
    if file is not None:
        prompt = read_prompt(file)
    if checkpoint == "best" and (run / "last").is_dir() and not (run / "best").exists():
        say_aside("the run has not been evaluated yet: its last checkpoint writes")
        checkpoint = "last"
    model, tokenizer = trained_model(run, checkpoint, op_set, device)
    if note := ops.slow_note(op_set, model.wte.weight.device):
        say_aside(note)
    if note := launch_cache.note(op_set, model.wte.weight.device):
        say_aside(note)
    ids = tokenizer.encode(prompt).tolist() if prompt else start_ids(tokenizer)
    context = model.config.context
    if len(ids) > context:
        say_aside(f"the prompt has {len(ids):,} tokens: its last {context:,} count")

    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    terminal = sys.stdout.isatty()
    show = printable if terminal else str
    dtype = devices.precision("auto", model.wte.weight.device).dtype
    start = time.perf_counter()
    texts = generate_batch(model, [ids] * config.samples, config, dtype)
    if config.samples == 1:
        sys.stdout.write(show(prompt or ""))
        piece = prompt or ""
        for tokens in texts:
            piece = tokenizer.decode(tokens)
            sys.stdout.write(show(piece))
            sys.stdout.flush()
    else:
        rows = zip(*texts, strict=True) if config.tokens else [()] * config.samples
        whole = [(prompt or "") + tokenizer.decode(row) for row in rows]
        piece = "\n---\n".join(map(show, whole))
        sys.stdout.write(piece)
    if terminal and not piece.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    count = config.samples * config.tokens
    say_aside(f"{count:,} tokens, {count / (time.perf_counter() - start):,.0f} a second")
    return 0


def compare_command(given: dict[str, Any]) -> int:
    from irongpt.compare.command import compare

    json_file, plot = (Path(f) if f else None for f in (given["json"], given["plot"]))
    return compare(given["device"], given["dtype"] or [], json_file, plot, given["ops"])


def doctor_command(given: dict[str, Any]) -> int:
    from irongpt.doctor import doctor

    return doctor(given["device"], Path(given["json"]) if given["json"] else None)


def tune_command(given: dict[str, Any]) -> int:
    from irongpt.tuning.command import tune

    return tune(given["device"], given["preset"], given["dtype"], given["quick"])


def read_prompt(file: str) -> str:
    """The text of a prompt file, or of standard input for -, without the line end at its end."""
    try:
        if file == "-" and sys.stdin is None:
            raise UserError("there is no standard input to read a prompt from")
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as e:
        raise UserError(f"cannot read the prompt file {file}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"the prompt file {file} is not UTF-8 text") from e
    return text.removesuffix("\n")


def say_aside(text: str) -> None:
    """A line about the text, which is not of the text."""
    print(f"irongpt: {text}", file=sys.stderr)
