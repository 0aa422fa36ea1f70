"""Times a training step on one GPU and on all of them, and the exchange of the gradients.

    torchrun --nproc-per-node 2 -m benchmarks.scaling
    torchrun --nproc-per-node 2 -m benchmarks.scaling --device cpu       nano in two processes

A step on one GPU is that of `irongpt train` without torchrun; on a CPU it has the threads of all
processes. Steps on one and on all GPUs are interleaved. `irongpt doctor` measures this once.
"""

import argparse
import statistics
import sys

import torch

from benchmarks.measure import result_file
from irongpt.config import PRESETS
from irongpt.errors import UserError
from irongpt.training import scaling
from irongpt.training.distributed import World, together


def run(world: World, args: argparse.Namespace) -> int:
    """Measures, and writes the section `scaling` of a result file."""
    if world.size == 1:
        raise UserError("one process: use torchrun --nproc-per-node 2 -m benchmarks.scaling")
    device = result_file.pick(args.device)
    world.check_device(device)
    preset = args.preset or ("iron" if device.type == "cuda" else "nano")
    options = dict(rounds=args.rounds, steps=args.steps)
    if world.rank:
        for _ in range(args.repeats):
            scaling.measure(world, device, preset, **options)
        return 0
    with result_file.Section("scaling", device, args) as section:
        total, repeats = None, []
        for _ in range(args.repeats):
            times = scaling.measure(world, device, preset, **options)
            medians = {
                f"{name}_seconds": statistics.median(getattr(times, name))
                for name in ("one", "all", "exchange")
            }
            repeats.append(medians | {"all_over_one": 1 / times.speedup})
            total = times if total is None else total.with_times_of(times)
            section.put(
                **vars(total),
                threads=torch.get_num_threads(),
                repeats=repeats,
                speedup=total.speedup,
                sentence=str(total),
            )
            print(times, flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = result_file.parser("benchmarks.scaling", __doc__)
    parser.prog = "torchrun --nproc-per-node 2 -m benchmarks.scaling"
    help = "model and batch size [iron on a GPU, else nano]"
    parser.add_argument("--preset", choices=list(PRESETS), help=help)
    help = "how often the measurement is repeated [3]"
    parser.add_argument("--repeats", type=int, default=3, help=help)
    parser.add_argument("--rounds", type=int, default=5, help="rounds in one measurement [5]")
    help = "steps per round [10, 3 on a CPU]"
    parser.add_argument("--steps", type=int, default=0, help=help)
    result_file.add_options(parser.add_argument)
    args = parser.parse_args(argv)
    try:
        return together(lambda world: run(world, args))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
