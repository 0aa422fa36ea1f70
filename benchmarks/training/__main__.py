"""Times training steps: milliseconds, tokens/s, MFU, memory, and the matmuls' share of the time.

    python -m benchmarks.training                    times iron on a GPU and nano on a CPU
    python -m benchmarks.training --nanogpt FOLDER   also times a checkout of nanoGPT

    eager, builtin, fused    the ops that `irongpt train --ops` offers
    naive                    builtin with attention in plain PyTorch
    ... compiled             torch.compile of the model's loss in its default mode
    ... max-autotune         torch.compile in its mode max-autotune, which uses CUDA graphs
    ... graph                the whole step as one CUDA graph
    ... as trained           a graph with deterministic algorithms, as in `irongpt train`
    nanoGPT                  its model and AdamW on the same batches, also compiled; if the preset
                             uses Muon, the variant "builtin AdamW" has the same optimizer

A step is `Trainer.train_step`: batch, forward, backward, gradient norm, optimizer. The variants are
interleaved, a few steps each, so that a GPU that gets hot slows down all of them. The weights and
the text are random.

The matmuls of a step are timed alone, one shape at a time, and so is Muon's iteration. The lower
bound of a step is computed: their time, and the least bytes of the other ops over the measured copy
bandwidth of the device (see `benchmarks.roofline`).
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from irongpt_kernels import builtin, eager

from benchmarks.measure import environment, result_file
from benchmarks.ops.providers import NAIVE
from benchmarks.presets import Setting, random_setting
from benchmarks.training import matmuls
from benchmarks.training.steps import Steps
from benchmarks.training.variants import Variant, nanogpt, trained
from irongpt import device as devices
from irongpt import ops
from irongpt.config import PRESETS
from irongpt.errors import UserError

BUDGET = {"cuda": 1200.0, "cpu": 110.0}  # seconds for all variants
SLOW = "max-autotune"  # compiles for minutes, so these variants come last
OPTIONS: dict[str, dict[str, Any]] = {  # of `trained`, by the words after the name of the ops
    "": {},
    "graph": dict(graph=True),
    "as trained": dict(graph=True, deterministic=True),
    "compiled": dict(mode="default"),
    "compiled graph": dict(mode="default", graph=True),
    SLOW: dict(mode=SLOW),
    "AdamW": dict(optimizer="adamw"),
    "AdamW compiled": dict(optimizer="adamw", mode="default"),
}


MODULES = {"fused": None, "builtin": builtin, "naive": NAIVE, "eager": eager}


def names(gpu: bool, nanogpt: bool, only: list[str] | None = None) -> list[str]:
    """The variants to time in each dtype, in their order. only: those that the user wants."""
    theirs = ["nanoGPT", "builtin AdamW"] if nanogpt else []
    every = ["builtin", "naive", "eager", *theirs, "builtin compiled"]
    if gpu:
        every = ["fused", *every, *(f"{name} graph" for name in MODULES)]
        every += ["fused as trained", "builtin as trained", "builtin compiled graph"]
        every += ["naive compiled", "fused compiled", "eager compiled", "fused compiled graph"]
        every += [f"{name} {SLOW}" for name in ("builtin", "naive", "eager")]
    elif "fused" in (only or []):
        every.insert(0, "fused")
    every += [f"{name} compiled" for name in theirs]
    return every if only is None else [name for name in every if name in only]


def make(
    name: str, setting: Setting, dtype: torch.dtype, device: torch.device, checkout: Path | None
) -> Variant:
    base, _, how = name.partition(" ")
    if base == "nanoGPT":
        assert checkout is not None
        return nanogpt(setting, checkout, dtype, device, compiled=how == "compiled")
    module = MODULES[base] or ops.load("fused", device, setting.model)
    return trained(setting, module, dtype, device, **OPTIONS[how])


def main(argv: list[str] | None = None) -> None:
    parser = result_file.parser("benchmarks.training", __doc__)
    help = "model and recipe [iron on a GPU, else nano]"
    parser.add_argument("--preset", choices=list(PRESETS), help=help)
    help = "sequences per step [the preset's]"
    parser.add_argument("--batch-size", type=int, metavar="N", help=help)
    help = "time only these, such as builtin 'fused as trained' 'nanoGPT compiled' [all]"
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=help)
    parser.add_argument("--steps", type=int, help="steps per round [10, 2 on a CPU]")
    parser.add_argument("--rounds", type=int, help="rounds per variant [8, 4 on a CPU]")
    help = "time limit for all variants together, in seconds [1200, 110 on a CPU]"
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=help)
    help = "checkout of nanoGPT, to time it too [it is not timed]"
    parser.add_argument("--nanogpt", metavar="FOLDER", type=Path, help=help)
    devices.reserve_workspace()  # must precede the first matmul, for the variants as trained
    args, device = result_file.parsed(parser, argv)
    preset = args.preset or ("iron" if device.type == "cuda" else "nano")
    try:
        setting = random_setting(preset, args.batch_size)
    except UserError as e:
        parser.error(str(e))
    dtypes = list(dict.fromkeys([devices.precision("auto", device).dtype, torch.float32]))
    here = device.type == "cuda", args.nanogpt is not None
    wanted = names(*here, args.variants)
    if unknown := ", ".join(sorted({*(args.variants or ())} - {*wanted})):
        parser.error(f"no variant here is {unknown}; there are {', '.join(names(*here))}")
    end = time.perf_counter() + (args.budget or BUDGET[device.type])
    with result_file.Section("train", device, args) as section:
        section.put(
            preset=preset,
            model=vars(setting.model),
            batch_size=setting.recipe.batch_size,
            nanogpt=args.nanogpt and environment.git_commit(args.nanogpt),
            matmuls={},
            rows=[],
        )
        peak_rates: dict[str, Any] = environment.peak_rates(device, dtypes)
        peak_rates |= {"peak": {}, "peak_from": {}}
        for dtype in dtypes:
            name = devices.dtype_name(dtype)
            peak = devices.peak_flops(device, dtype)
            peak_rates["peak"][name], peak_rates["peak_from"][name] = peak
            times = matmuls.measure(setting, dtype, device, peak_rates)
            section.put(peak_rates=peak_rates, matmuls=section.values["matmuls"] | {name: times})
            print(matmuls.line(name, times), flush=True)
        groups = [[name for name in wanted if (SLOW in name) == slow] for slow in (False, True)]
        parts = [(group, dtype) for group in groups if group for dtype in dtypes]
        for i, (group, dtype) in enumerate(parts, start=1):
            share = 1.0 if i == len(parts) else 0.5  # of the time that is left
            now = time.perf_counter()
            steps = Steps(section, setting, devices.dtype_name(dtype), args)
            makers = {
                name: partial(make, name, setting, dtype, device, args.nanogpt) for name in group
            }
            steps.measure(makers, now + share * (end - now))


if __name__ == "__main__":
    main()
