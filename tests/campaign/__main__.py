"""Runs a campaign: random cases, each of which depends only on the seed and its number.

    python -m tests.campaign ops            every op against float64, in Triton's interpreter
    python -m tests.campaign ptx            the same in the code that is compiled for sm_75
    python -m tests.campaign checkpoints    a run folder with one changed byte, file or value is
                                            resumed, and text is generated from it
    python -m tests.campaign inputs         malformed command lines and files
    python -m tests.campaign kill           a run is killed at a random instant, then resumed
    python -m tests.campaign disk           a full, read-only, broken or slow disk at every write

Every thousand cases, or every minute, a line reports how many are done. The first fault ends the
campaign with exit code 1, after the number of its case is printed: --only runs that case again.
With --resume, a campaign that was stopped continues after the last case that passed. Linux only.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
COUNTS = dict(ops=10_000, ptx=1_000, checkpoints=10_000, inputs=0, kill=200, disk=0)
EVERY_CASES, EVERY_SECONDS = 1000, 60.0  # between two lines


def cases(name: str, seed: int, numbers: Iterable[int], folder: Path) -> Iterator[tuple[int, str]]:
    """Runs the cases with these numbers, up to the last one of a campaign that has an end, and
    yields the number and the kind of each that passed. A case that fails raises."""
    module = importlib.import_module(f"tests.campaign.{name}")
    with contextlib.ExitStack() as stack:
        case = module.Case(folder, stack)
        for number in numbers:
            if number == getattr(case, "count", None):
                return
            yield number, case(random.Random(f"{seed} {number}"), number)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help = f"the campaign: {', '.join(COUNTS)}"
    parser.add_argument("name", metavar="NAME", choices=COUNTS, help=help)
    usual = ", ".join(f"{name} {n:,}" for name, n in COUNTS.items() if n)
    help = f"number of cases; 0: all that there are [{usual}; else all]"
    parser.add_argument("--n", type=int, help=help)
    help = "seed of the random cases [1]"
    parser.add_argument("--seed", type=int, default=1, help=help)
    parser.add_argument("--only", type=int, metavar="K", help="run case K alone")
    help = "keep the progress in FILE, and continue from it"
    parser.add_argument("--resume", type=Path, metavar="FILE", help=help)
    args = parser.parse_args(argv)
    state: dict[str, Any] = dict(name=args.name, seed=args.seed, done=0, seconds=0.0, kinds={})
    if args.resume and args.resume.exists():
        state |= json.loads(args.resume.read_text())
        if (state["name"], state["seed"]) != (args.name, args.seed):
            parser.error(f"{args.resume} is of campaign {state['name']}, seed {state['seed']}")
    n = COUNTS[args.name] if args.n is None else args.n
    numbers = range(state["done"], n or sys.maxsize) if args.only is None else [args.only]
    return run(args, state, numbers)


def run(args: argparse.Namespace, state: dict[str, Any], numbers: Iterable[int]) -> int:
    """Runs the cases, prints the progress and saves it in args.resume."""
    kinds = collections.Counter(state["kinds"])
    start = reported = time.monotonic()
    code, at, before = 0, state["done"], state["seconds"]

    def tell() -> None:
        state.update(done=at, seconds=before + time.monotonic() - start, kinds=kinds)
        text = f"{args.name}, seed {args.seed}: {at:,} cases passed, {state['seconds']:,.0f} s"
        print(text, flush=True)
        if args.resume:
            args.resume.write_text(json.dumps(state))

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            for number, kind in cases(args.name, args.seed, numbers, Path(folder)):
                kinds[kind] += 1
                at = number + 1
                late = time.monotonic() - reported > EVERY_SECONDS
                if late or at % EVERY_CASES == 0:
                    tell()
                    reported = time.monotonic()
        except KeyboardInterrupt:
            code = 130
        except Exception:
            traceback.print_exc()
            at = args.only if args.only is not None else at
            print(f"FAULT in case {at}; again: python -m tests.campaign {args.name} "
                  f"--seed {args.seed} --only {at}")  # fmt: skip
            code = 1
    tell()
    for kind, count in sorted(kinds.items()):
        print(f"    {count:6,}  {kind}")
    return code


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    os.environ["TRITON_INTERPRET"] = "0" if name == "ptx" else "1"  # before anything imports Triton
    sys.path[:0] = [str(TESTS), str(TESTS / "helpers")]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
