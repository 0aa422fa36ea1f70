"""The command line. Most flags are the fields of the dataclasses in `config`."""

import argparse
import gc
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn

from irongpt import __version__
from irongpt.config import (
    DTYPES,
    OPS,
    PRESETS,
    Flags,
    GPTConfig,
    SampleConfig,
    TrainConfig,
    check,
    flag,
)  # fmt: skip
from irongpt.console import output, read_standard_input, say_on_stderr
from irongpt.data.folder import Reader
from irongpt.data.text import ERRORS, without_license
from irongpt.errors import DivergenceError, UserError, out_of_memory, short_reason, shortened
from irongpt.files import FULL, backup, write_error_reason

GROUPS = {  # of the flags in `irongpt train --help`
    "run": "the preset, the text and the folder",
    "model": "the shape of the model",
    "recipe": "how the model is trained",
    "machine": "the device, the dtype and the implementation of the ops",
}
FUSED: dict[str, Any] = dict(
    action="store_const", const="fused", dest="ops", help="short for --ops fused"
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose result has only the flags that were given."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Also a command's parser names the flags that it does not know."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code. A user's mistake prints one line and returns 2."""
    with output():
        command, flags, code = None, {}, 0
        try:
            given = vars(build_parser().parse_args(argv))
            command, flags = given.pop("run_command"), given.copy()
            code = int(command(given))
            sys.stdout.flush()
            return code
        except (UserError, DivergenceError) as e:
            print("irongpt: error:", shortened(" ".join(str(e).split())), file=sys.stderr)
            return 2 if isinstance(e, UserError) else 1
        except BrokenPipeError:  # the reader of our output has closed it
            return code
        except KeyboardInterrupt as e:
            return 128 + getattr(e, "signal", 2)
        except (MemoryError, RuntimeError, OSError) as e:
            if isinstance(e, OSError) and e.errno in FULL:
                reason = write_error_reason(e, Path(e.filename or "."))
                print(f"irongpt: error: cannot write: {shortened(reason)}", file=sys.stderr)
                return 2
            if not out_of_memory(e):
                raise
            hint = "close other programs, or use a machine with more memory"
            if flags.get("samples", 1) > 1:
                hint = "use fewer --samples"
            elif command is train_command:
                hint = "use a smaller --batch-size with a larger --grad-accum"
                if "resume" in flags:
                    hint = f"start a new run: {hint}; a resumed run keeps both"
            print(f"irongpt: error: out of memory: {hint}", file=sys.stderr)
            return 2


def user_path(text: str) -> Path:
    """The path that the user gives, with a ~ that the shell has left."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError("a name cannot have the character U+0000")
    try:
        return Path(text).expanduser()
    except RuntimeError as e:
        raise argparse.ArgumentTypeError(f"{text}: {short_reason(e)}") from e


def build_parser() -> Parser:
    parser = Parser(
        prog="irongpt",
        description="A GPT from scratch: train it, generate text with it, and check its kernels.",
        epilog="irongpt COMMAND --help shows the flags of a command.",
    )
    parser.add_argument("--version", action="version", version=f"irongpt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Flags], int], help: str, more: str = "") -> Parser:
        text = f"{help[0].upper()}{help[1:]}. {more}"
        added: Parser = commands.add_parser(name, help=help, description=text)
        added.set_defaults(run_command=run)
        return added

    more = "Defaults are in [brackets], by preset if they differ."
    _train_flags(command("train", train_command, "train a model, or resume a run", more))
    _generate_flags(command("generate", generate_command, "generate text with a trained model"))

    more = "transformers loads the folder with AutoModelForCausalLM and AutoTokenizer."
    help = "write a model in Hugging Face's GPT-2 layout"
    _export_flags(command("export", export_command, help, more))

    more = "`irongpt train --resume RUN --data TEXT` then trains it on a text."
    help = "import a GPT-2 in Hugging Face's layout as a run"
    add = command("import", import_command, help, more)
    help = "folder with config.json, model.safetensors and tokenizer.json"
    add.add_argument("folder", metavar="FOLDER", type=user_path, help=help)
    add.add_argument("run", metavar="RUN", type=user_path, help="folder of the new run")

    more = "A text that is longer than the context is read in overlapping windows."
    help = "write an HTML page with the probability that the model gives to each token of a text"
    _show_flags(command("show", show_command, help, more))

    more = "The exit code is 1 if a check fails. "
    more += "On a CPU it takes about 5 minutes with --arch, and up to 20 in Triton's interpreter."
    run = _call("compare.command", "compare")
    help = "compare the kernels with eager PyTorch in float64"
    compare = command("compare", run, help, more)
    dtypes = "dtype to check; repeat the flag for several [all that the device supports]"
    compare.add_argument("--dtype", dest="dtypes", action="append", choices=DTYPES, help=dtypes)
    help = "implementation to check [fused]"
    compare.add_argument("--ops", dest="candidate", choices=OPS[1:], help=help)
    compiled = "execute on the CPU the code that is compiled for sm_75 (T4), sm_80 or sm_90"
    compare.add_argument("--arch", metavar="SM", help=compiled)
    file: dict[str, Any] = dict(type=user_path, metavar="FILE")
    compare.add_argument("--json", dest="json_file", help="write all numbers to FILE", **file)
    compare.add_argument("--plot", help="plot errors and losses to FILE", **file)

    help = "show which device, dtype and kernels will be used here, and why"
    doctor = command("doctor", _call("doctor", "doctor"), help)
    doctor.add_argument("--json", dest="json_file", help="also write the report to FILE", **file)

    help = "measure tiles, warps and stages of the kernels on this GPU; later runs use the fastest"
    tune = command("tune", _call("tuning", "tune"), help)
    tune.add_argument("--preset", choices=list(PRESETS), help="model and batch size [iron]")
    tune.add_argument("--dtype", choices=("auto", *DTYPES), help="dtype of the matmuls [auto]")
    quick = "measure a third of the candidates, with fewer samples each"
    tune.add_argument("--quick", action="store_true", help=quick)
    for added in (compare, doctor, tune):
        _flags_of_train(added, "device")
    return parser


def _train_flags(train: Parser) -> None:
    train.usage = "%(prog)s [--preset NAME] [--data TEXT] [--out RUN | --resume RUN] [FLAG ...]"
    groups = {name: train.add_argument_group(name, text) for name, text in GROUPS.items()}
    run, machine = groups["run"], groups["machine"]
    presets = "; ".join(f"{name}: {p.summary}" for name, p in PRESETS.items())
    help = f"model and recipe. {presets} [iron on a GPU, nano on a CPU]"
    run.add_argument("--preset", choices=list(PRESETS), help=help)
    help = (
        "text to train on: war-and-peace, python-docs, python-code, python-packages, a text file, "
        "a folder of code, or - for standard input; repeat the flag to join several "
        "[war-and-peace; preset code: python-packages; nano-code: python-code]"
    )
    run.add_argument("--data", metavar="TEXT", action="append", help=help)
    help = (
        "validation text: as --data, but not '-' [the last tenth of a single text; of several "
        "files about a tenth of the files, chosen by a hash of their paths]"
    )
    run.add_argument("--val", metavar="TEXT", help=help)
    help = "glob pattern of files to read from a folder, such as '*.js'; can be repeated ['*.py']"
    run.add_argument("--include", metavar="PATTERN", action="append", help=help)
    _text_flags(run, "--data")
    help = "tokens of a BPE vocabulary, rounded up to a multiple of 64 "
    help += "[best 1024, code and nano-code 4096; others 4096 below 30 MB of text, else 8192]"
    run.add_argument("--vocab-size", metavar="N", type=int, help=help)
    folder = run.add_mutually_exclusive_group()
    help = "folder of the new run [runs/TEXT-PRESET; if it exists, runs/TEXT-PRESET-2, ...]"
    folder.add_argument("--out", metavar="RUN", type=user_path, help=help)
    help = "continue the run in this folder from its last checkpoint, as if it had never stopped"
    folder.add_argument("--resume", metavar="RUN", type=user_path, help=help)
    for config in (GPTConfig, TrainConfig):
        for f in fields(config):
            if "help" in f.metadata:
                values = [(p.model | p.train).get(f.name, f.default) for p in PRESETS.values()]
                _config_flag(groups[f.metadata["group"]], f, values)
    help = "also write the metrics and samples as TensorBoard's event files, into the run's folder"
    run.add_argument("--tensorboard", action="store_true", help=help)
    machine.add_argument("--fused", **FUSED)
    help = "launch the kernels one by one, not as a CUDA graph: slower; the results are the same, "
    help += "except that builtin samples other dropout masks"
    machine.add_argument("--no-graph", action="store_false", dest="graph", help=help)


def _text_flags(parser: argparse._ActionsContainer, what: str) -> None:
    help = f"text encoding of {what}, such as cp1252 [UTF-8, or UTF-16/32 with a byte order mark]"
    parser.add_argument("--encoding", metavar="NAME", help=help)
    help = f"if bytes of {what} cannot be decoded, strict: fail; replace: use U+FFFD [strict]"
    parser.add_argument("--errors", choices=ERRORS, help=help)


def _generate_flags(generate: Parser) -> None:
    generate.add_argument("run", metavar="RUN", type=user_path, help="folder of the run")
    prompt = generate.add_mutually_exclusive_group()
    help = "text to continue [<|endoftext|>; a line break if the run was trained on a single text]"
    prompt.add_argument("--prompt", metavar="TEXT", help=help)
    help = "file with the text to continue, or - for standard input; a last line break is removed"
    prompt.add_argument("--prompt-file", metavar="FILE", help=help)
    _text_flags(generate, "--prompt-file")
    for f in fields(SampleConfig):
        _config_flag(generate, f, [f.default])
    help = "stop at the end of a document, <|endoftext|>"
    generate.add_argument("--stop-at-end", action="store_true", help=help)
    _checkpoint_flag(generate)
    _flags_of_train(generate, "ops", "device")
    generate.add_argument("--fused", **FUSED)


def _flags_of_train(parser: Parser, *names: str) -> None:
    """Flags of `irongpt train` that another command has too."""
    for f in fields(TrainConfig):
        if f.name in names:
            _config_flag(parser, f, [f.default])


def _checkpoint_flag(parser: Parser) -> None:
    help = "best: the lowest validation loss; last: the newest [best]"
    parser.add_argument("--checkpoint", choices=("best", "last"), help=help)


def _export_flags(export: Parser) -> None:
    export.add_argument("run", metavar="RUN", type=user_path, help="folder of the run")
    help = "new folder for the model; or FILE.gguf, for llama.cpp (needs the package gguf)"
    export.add_argument("folder", metavar="FOLDER", type=user_path, help=help)
    help = "dtype of the weights [float32]"
    export.add_argument("--dtype", choices=("float32", "float16"), help=help)
    _checkpoint_flag(export)


def _show_flags(show: Parser) -> None:
    show.add_argument("run", metavar="RUN", type=user_path, help="folder of the run")
    text = show.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="TEXT", help="text to show [the newest sample of the run]")
    help = "file with the text, or - for standard input"
    text.add_argument("--file", metavar="FILE", help=help)
    _text_flags(show, "--file")
    help = "file to write [RUN/show.html]"
    show.add_argument("--out", metavar="PAGE", type=user_path, help=help)
    _checkpoint_flag(show)
    _flags_of_train(show, "device")


def _config_flag(parser: argparse._ActionsContainer, f: Field[Any], values: list[Any]) -> None:
    """The flag of a config's field. values: its default, or that of each preset."""
    shown = ["none" if value is None else str(value) for value in values]
    if len(set(shown)) > 1:
        shown = [f"{name} {value}" for name, value in zip(PRESETS, shown, strict=True)]
    kind: Any = f.type.__args__[0] if isinstance(f.type, UnionType) else f.type
    parser.add_argument(
        flag(f.name),
        type=kind,
        choices=f.metadata["choices"],
        metavar=None if f.metadata["choices"] else {int: "N", float: "X", str: "NAME"}[kind],
        help=f"{f.metadata['help']} [{', '.join(dict.fromkeys(shown))}]".replace("%", "%%"),
    )


def _imported(module: str) -> Any:
    """Imports PyTorch without passes of the garbage collector over its objects, which would take
    0.7 of 2.5 seconds (measured on an AMD EPYC), partly at the exit."""
    first = "torch" not in sys.modules and gc.isenabled()
    if first:
        gc.disable()
    try:
        return importlib.import_module(f"irongpt.{module}")
    finally:
        if first:
            gc.freeze()
            gc.enable()


def _call(module: str, function: str) -> Callable[[Flags], int]:
    """A command that is one function of its flags. Its module is imported when it runs."""
    return lambda flags: int(getattr(_imported(module), function)(**flags))


def train_command(flags: Flags) -> int:
    start = time.perf_counter()  # importing torch takes seconds, which count as set-up
    return int(_imported("training.command").train(flags, start))


def generate_command(flags: Flags) -> int:
    checkpoint, run = _checkpoint(flags), flags.pop("run")
    op_set, device = flags.pop("ops", "builtin"), flags.pop("device", "auto")
    names = flags.keys() & {f.name for f in fields(SampleConfig)}
    config = SampleConfig(**{name: flags[name] for name in names})
    if run.name in ("best", "last") and not os.path.exists(run / "config.json"):
        run, checkpoint = run.resolve().parent, run.name  # a checkpoint, of the run above it
    text = read_file(flags, "--prompt-file FILE")
    prompt = flags.get("prompt", "") if text is None else text
    generate = _imported("generation.command").generate
    generate(run, checkpoint, prompt, config, "stop_at_end" in flags, op_set, device)
    return 0


def export_command(flags: Flags) -> int:
    folder, which, dtype = flags["folder"], _checkpoint(flags), flags.get("dtype", "float32")
    if folder.suffix == ".gguf":
        _imported("interchange.gguf_file").export_gguf(flags["run"], folder, which, dtype)
        print(f"{folder} is written")
    else:
        _imported("interchange.export").export(flags["run"], folder, which, dtype)
        print(f"{folder} is written; its README.md shows how transformers loads it")
    return 0


def import_command(flags: Flags) -> int:
    run = flags["run"]
    model = _imported("interchange.importer").import_model(flags["folder"], run)
    print(
        f"{model.n_params():,} parameters, {model.vocab_size:,} tokens, context {model.context:,}"
    )
    print(f"generate text: irongpt generate {run}; train: irongpt train --resume {run} --data TEXT")
    return 0


def show_command(flags: Flags) -> int:
    checkpoint, run = _checkpoint(flags), flags["run"]
    text, module = read_file(flags, "--file FILE"), _imported("interchange.show")
    if text is None:
        text = flags["text"] if "text" in flags else module.newest_sample(run)
    out = flags.get("out", run / "show.html")
    print(module.show(run, text, out, checkpoint, flags.get("device", "auto")))
    print(f"open {out} in a browser")
    return 0


def _checkpoint(flags: Flags) -> str:
    """The checkpoint that the flags name, else `best`, or `last` if there is no `best` yet."""
    run, name = flags["run"], flags.pop("checkpoint", None)
    best = run / "best", backup(run / "best")
    if name is None and os.path.isdir(run / "last") and not any(map(os.path.exists, best)):
        say_on_stderr("the run has not been evaluated yet: using its last checkpoint")
        return "last"
    return name or "best"


def read_file(flags: Flags, option: str) -> str | None:
    """The text of the file that an option such as --file FILE names, or of standard input for -,
    without a line break at its end. None if the option is not given."""
    flag = option.split()[0]
    file = flags.pop(flag.removeprefix("--").replace("-", "_"), None)
    reading = {name: flags.pop(name) for name in ("encoding", "errors") if name in flags}
    check(file is not None or not reading, f"--encoding and --errors are for {option}")
    if file is None:
        return None
    reader = Reader(say_on_stderr, **reading)
    named = f"the {flag.removeprefix('--').replace('-', ' ')} {file}"
    try:
        data = read_standard_input() if file == "-" else Path(file).expanduser().read_bytes()
    except (OSError, RuntimeError, ValueError) as e:
        raise UserError(f"cannot read {named}: {short_reason(e)}") from e
    text = reader.decode(data, "the standard input" if file == "-" else named)
    for note in text.notes:
        say_on_stderr(note)
    return without_license(text.utf8).decode().removesuffix("\n")
