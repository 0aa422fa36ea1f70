"""Training as it is: milliseconds a step, tokens/s, MFU, memory, and where the step's time goes.

    python -m benchmarks.training                    iron on a GPU, nano on a CPU
    python -m benchmarks.training --nanogpt FOLDER   and the same work by a checkout of nanoGPT

    eager, builtin, fused    the ops that `irongpt train --ops` offers
    naive                    builtin with attention written out: what a model costs without kernels
    ... compiled             torch.compile of the model's loss in mode default
    ... max-autotune         in that mode, which has CUDA graphs of its own
    ... graph                the whole step as one CUDA graph
    ... as trained           that, with deterministic algorithms: what `irongpt train` runs
    nanoGPT                  its model and AdamW, on the same batches, compiled too; beside it
                             builtin AdamW, which does the same work where our preset has another
                             optimizer

A step is `Trainer.train_step`: batch, forward, backward, gradient norm, optimizer. The variants
take turns, some steps each, so that a card that gets hot slows all of them. Weights are fresh ones.

Of the step's matrix products each shape is timed alone, and so is Muon's iteration; what is left
of a step is all else. The floor, `computed`, is their time and the least bytes of the other ops at
this device's measured copy bandwidth.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from irongpt_kernels import builtin, eager

from benchmarks.measure import environment, result_file
from benchmarks.ops.providers import Textbook
from benchmarks.training import matmuls
from benchmarks.training.steps import Make, Steps
from benchmarks.training.variants import Variant, nanogpt, trained
from irongpt import device as devices
from irongpt import ops
from irongpt.config import PRESETS, GPTConfig, TrainConfig
from irongpt.data import corpus
from irongpt.data.tokenizer import CharTokenizer

BUDGET = {"cuda": 1200.0, "cpu": 110.0}  # seconds for all
# Who has had how much of them: 16 bits and float32 by what compiles in seconds, then by the rest.
PARTS = (0.45, 0.75, 0.9, 1.0)
SLOW = "max-autotune"  # it may compile for minutes


def variants(
    dtype: torch.dtype, device: torch.device, only: list[str] | None, checkout: Path | None
) -> list[tuple[str, Make]]:
    """What is timed in one dtype: the cheap ones first, those that compile for minutes last."""
    gpu = device.type == "cuda"
    found: list[tuple[str, Make]] = []

    def add(name: str, module: Any, **options: Any) -> None:
        def make(setting: tuple[Any, ...]) -> Variant:
            chosen = ops.load("fused", device, setting[0]) if module is None else module
            return trained(setting, chosen, dtype, device, **options)

        found.append((name, make))

    modules = {"fused": None, "builtin": builtin, "naive": Textbook, "eager": eager}
    for name, module in modules.items():
        if module is not None or gpu or (only and name in only):
            add(name, module)
    if checkout is not None:
        found.append(("nanoGPT", lambda s: nanogpt(s, checkout, dtype, device)))
        add("builtin AdamW", builtin, optimizer="adamw")
    if gpu:
        for name in ("fused", "builtin", "naive", "eager"):
            add(f"{name} graph", modules[name], graph=True)
        for name in ("fused", "builtin"):
            add(f"{name} as trained", modules[name], graph=True, deterministic=True)
    add("builtin compiled", builtin, mode="default")
    if gpu:
        add("builtin compiled graph", builtin, mode="default", graph=True)
        for name in ("naive", "fused", "eager"):
            add(f"{name} compiled", modules[name], mode="default")
        add("fused compiled graph", None, mode="default", graph=True)
    if checkout is not None:
        found.append(("nanoGPT compiled", lambda s: nanogpt(s, checkout, dtype, device, True)))
        add("builtin AdamW compiled", builtin, optimizer="adamw", mode="default")
    if gpu:
        for name in ("builtin", "naive", "eager"):
            add(f"{name} {SLOW}", modules[name], mode=SLOW)
    return [pair for pair in found if only is None or pair[0] in only]


def setting_of(preset: str, batch_size: int | None) -> tuple[GPTConfig, TrainConfig, torch.Tensor]:
    """Model, recipe and token ids. Speed does not depend on the text: the built-in one will do."""
    text = corpus.load("python-docs", say=lambda line: None).text[:400_000]
    tokenizer = CharTokenizer.from_text(text)
    model = GPTConfig(vocab_size=tokenizer.vocab_size, **PRESETS[preset].model)
    recipe = dict(PRESETS[preset].train)
    if batch_size is not None:
        recipe["batch_size"] = batch_size
    return model, TrainConfig(**recipe), tokenizer.encode(text)


def _products(
    section: result_file.Section, setting: tuple[Any, ...], dtype: torch.dtype, device: torch.device
) -> None:
    config, recipe, _ = setting
    found = matmuls.measure(config, recipe, dtype, device)
    peak_rates = section.values["peak_rates"]
    found |= matmuls.floor(config, recipe, dtype, matmuls.of_step(found), peak_rates)
    section.put(matmuls=section.values["matmuls"] | {devices.dtype_name(dtype): found})
    print(matmuls.line(devices.dtype_name(dtype), found), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="training steps of every variant")
    parser.add_argument("--preset", choices=list(PRESETS), help="[iron on a GPU, else nano]")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="those only")
    parser.add_argument("--dtypes", nargs="+", choices=list(devices.DTYPES))
    parser.add_argument("--batch-size", type=int, help="windows a step [the preset's]")
    parser.add_argument("--steps", type=int, help="in a turn [10, 2 on a CPU]")
    parser.add_argument("--turns", type=int, help="of each variant [8, 4 on a CPU]")
    parser.add_argument("--budget", type=float, help="seconds for all [1200, 110 on a CPU]")
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT")
    result_file.add_options(parser)
    args = parser.parse_args(argv)
    devices.reserve_workspace()  # before the first product, for the variants as trained
    device = devices.pick(args.device)
    gpu = device.type == "cuda"
    preset = args.preset or ("iron" if gpu else "nano")
    setting = setting_of(preset, args.batch_size)
    half = devices.precision("auto", device).dtype
    dtypes = list(dict.fromkeys([half, torch.float32]))
    if args.dtypes:
        dtypes = [devices.DTYPES[name] for name in args.dtypes]
    budget, began = args.budget or BUDGET[device.type], time.perf_counter()
    with result_file.Section("train", device, args) as section:
        section.put(
            preset=preset,
            model=vars(setting[0]),
            batch_size=setting[1].batch_size,
            nanogpt=args.nanogpt and environment.git_commit(args.nanogpt),
            matmuls={},
            rows=[],
        )
        peak_rates = environment.peak_rates(device, dtypes)
        found = {devices.dtype_name(d): devices.peak_flops(device, d) for d in dtypes}
        peak_rates["peak"] = {name: flops for name, (flops, _) in found.items()}
        peak_rates["peak_from"] = {name: source for name, (_, source) in found.items()}
        section.put(peak_rates=peak_rates)
        for dtype in dtypes:
            _products(section, setting, dtype, device)
        parts = [(slow, dtype) for slow in (False, True) for dtype in dtypes]
        for (slow, dtype), part in zip(parts, PARTS[-len(parts) :], strict=True):
            chosen = variants(dtype, device, args.variants, args.nanogpt)
            chosen = [pair for pair in chosen if (SLOW in pair[0]) == slow]
            steps = Steps(section, setting, dtype, device, args)
            steps.measure(chosen, began + part * budget)
    print(f"written to {section.path}")


if __name__ == "__main__":
    main()
