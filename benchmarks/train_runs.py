"""Times complete training runs of each preset, seed and implementation, and records their losses.

    python -m benchmarks.train_runs --iters 300        300 steps
    python -m benchmarks.train_runs --section target   until the loss is 1.38 (nano: 1.80)
    python -m benchmarks.train_runs --section target --preset fast --seeds 1 2 3 4 5

The implementations train on the same text and batches for the same preset and seed, and eager and
fused apply the same dropout masks. The training is that of `irongpt train` without checkpoints and
samples. Its seconds include neither the evaluations, which are timed separately, nor the first
steps, which compile the kernels.
"""

import argparse
import itertools
import math
import time
from dataclasses import replace

import torch

from benchmarks.measure import result_file
from benchmarks.measure.rows import RunRow
from benchmarks.presets import Setting
from irongpt import device as devices
from irongpt import ops, timing
from irongpt.config import OPS, PRESETS, GPTConfig, TrainConfig
from irongpt.cuda_graph import WARMUP
from irongpt.data import corpus
from irongpt.data.corpus import Corpus
from irongpt.data.tokens import tokenize
from irongpt.model import GPT
from irongpt.training.trainer import Trainer

TARGETS = {"iron": 1.38, "fast": 1.38, "nano": 1.80}
LIMIT = {"cuda": 600.0, "cpu": 100.0}  # seconds per run
WARM_STEPS = {"cuda": WARMUP + 2, "cpu": 1}  # not timed: they compile, and a GPU captures the step


def train(
    row: RunRow, setting: Setting, dtype: torch.dtype, device: torch.device, limit: float
) -> None:
    """Trains until the last step, the row's target or the limit in seconds, and fills the row."""
    recipe = setting.recipe
    module = ops.load(row.ops, device, setting.model)
    torch.manual_seed(recipe.seed)
    model = GPT(setting.model, module).to(device)
    trainer = Trainer(model, setting.tokens, recipe, device, dtype)
    row.warm_steps = WARM_STEPS[device.type]
    start = time.perf_counter()
    recent = [trainer.train_step() for _ in range(row.warm_steps)]  # since the last curve's entry
    devices.synchronize(device)
    row.warm_seconds = time.perf_counter() - start
    seconds = 0.0
    while (
        trainer.step < recipe.iters
        and seconds + row.evaluation_seconds < limit
        and row.finite
        and not row.reached
    ):
        start = time.perf_counter()
        until = min(recipe.iters, (trainer.step // recipe.log_every + 1) * recipe.log_every)
        recent += [trainer.train_step() for _ in range(trainer.step, until)]
        losses = torch.stack(recent)[:, 0].tolist()
        seconds += time.perf_counter() - start
        row.curve.append([trainer.step, seconds, sum(losses) / len(losses)])
        recent, row.finite = [], math.isfinite(losses[-1])
        if trainer.step % recipe.eval_every == 0 or trainer.step == recipe.iters:
            start = time.perf_counter()
            loss = trainer.evaluate()
            row.evaluation_seconds += time.perf_counter() - start
            assert loss is not None
            row.evaluated.append([trainer.step, seconds, loss])
            row.bits_per_byte = trainer.tokens.bits_per_byte(loss)
            row.reached = row.target is not None and loss <= row.target
    row.steps, row.seconds, row.dtype = trainer.step, seconds, devices.dtype_name(dtype)
    row.tokens_per_s = (trainer.step - row.warm_steps) * trainer.tokens_per_step() / seconds


def line(row: RunRow) -> str:
    """A row for a terminal."""
    if not row.timed:
        return f"{row.run:22} -  {row.skipped_reason}"
    text = f"{row.run:22} {row.steps} steps in {row.seconds:.1f} s: "
    text += f"training loss {row.curve[-1][2]:.4f}" if row.curve else "no loss"
    if row.validation_loss is not None:
        text += f", validation {row.validation_loss:.4f} ({row.bits_per_byte:.3f} bits per byte)"
    if row.target is not None:
        text += f"; {row.target} {'reached' if row.reached else 'not reached'}"
    return text + ("" if row.finite else "; STOPPED: the loss is not finite")


def setting_of(preset: str, text: Corpus, args: argparse.Namespace) -> Setting:
    """The preset with the steps of the command line, and the tokens of the text."""
    p = PRESETS[preset]
    recipe = dict(p.train)
    if args.iters or args.section == "runs":
        recipe["iters"] = args.iters or 300
    often = 250 if args.section == "target" else recipe["iters"]
    recipe["eval_every"] = min(recipe["eval_every"], often)
    train_config = TrainConfig(**recipe)
    tokenizer, ids = tokenize(text, train_config.tokenizer, p.vocab_size)
    return Setting(GPTConfig(vocab_size=tokenizer.vocab_size, **p.model), train_config, ids)


def main(argv: list[str] | None = None) -> None:
    parser = result_file.parser("benchmarks.train_runs", __doc__)
    help = "runs: a fixed number of steps; target: until --target-loss [runs]"
    parser.add_argument("--section", choices=["runs", "target"], default="runs", help=help)
    help = (
        f"presets: {', '.join(PRESETS)} [iron; fast and iron with --section target; nano on a CPU]"
    )
    parser.add_argument("--preset", nargs="+", metavar="NAME", choices=list(PRESETS), help=help)
    usual = "[all; without eager on a CPU with --section target]"
    help = f"implementations of the ops: {', '.join(OPS)} {usual}"
    parser.add_argument("--ops", nargs="+", metavar="NAME", choices=OPS, help=help)
    help = "seeds, one run for each [the preset's seed]"
    parser.add_argument("--seeds", nargs="+", metavar="N", type=int, help=help)
    names = ["auto", *devices.DTYPES]
    help = "dtype of the matmuls [auto]"
    parser.add_argument("--dtype", choices=names, default="auto", help=help)
    help = "steps of a run [300; the preset's with --section target]"
    parser.add_argument("--iters", metavar="N", type=int, help=help)
    help = "text, as in irongpt train [the preset's]"
    parser.add_argument("--data", metavar="TEXT", help=help)
    help = "validation loss that ends --section target [iron, fast 1.38; nano 1.80]"
    parser.add_argument("--target-loss", metavar="LOSS", type=float, help=help)
    help = "time limit of each run, in seconds [600, 100 on a CPU]"
    parser.add_argument("--limit", metavar="SECONDS", type=float, help=help)
    args, device = result_file.parsed(parser, argv)
    dtype = devices.precision(args.dtype, device).dtype
    gpu, to_target = device.type == "cuda", args.section == "target"
    presets = args.preset or ((["fast"] if to_target else []) + ["iron"] if gpu else ["nano"])
    if to_target and not args.target_loss and (without := set(presets) - TARGETS.keys()):
        parser.error(f"--target-loss is needed for {', '.join(sorted(without))}")
    if args.iters is not None and args.iters <= (warm := WARM_STEPS[device.type]):
        parser.error(f"--iters must be above {warm}, the warm-up steps, got {args.iters}")
    sources = {preset: args.data or PRESETS[preset].data or None for preset in presets}
    texts = {source: corpus.load(source, say=print) for source in dict.fromkeys(sources.values())}
    settings = {preset: setting_of(preset, texts[sources[preset]], args) for preset in presets}
    devices.make_deterministic()
    modules = args.ops or ["fused", "builtin", *(["eager"] if gpu or not to_target else [])]
    with result_file.Section(args.section, device, args) as section:
        section.put(
            preset=", ".join(presets),
            text=", ".join(text.name for text in texts.values()),
            text_sha256=", ".join(text.sha256 for text in texts.values()),
            rows=[],
        )
        for preset, seed, name in itertools.product(presets, args.seeds or [None], modules):
            setting, words = settings[preset], [preset, name]
            if seed is not None:
                setting = setting._replace(recipe=replace(setting.recipe, seed=seed))
                words.append(f"seed {seed}")
            row = RunRow(run=", ".join(words), preset=preset, ops=name)
            row.target = (args.target_loss or TARGETS[preset]) if to_target else None
            try:
                train(row, setting, dtype, device, args.limit or LIMIT[device.type])
            except Exception as e:  # the other runs continue
                row.skipped_reason = timing.reason(e)
            print(line(row), flush=True)
            section.put(rows=[*section.values["rows"], row])


if __name__ == "__main__":
    main()
