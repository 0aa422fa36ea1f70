"""Complete trainings for each preset, seed and implementation: the loss over steps and seconds.

    python -m benchmarks.train_runs --iters 300        300 steps
    python -m benchmarks.train_runs --section target   until the loss is 1.38 (nano: 1.80)
    python -m benchmarks.train_runs --section target --preset fast --seeds 1 2 3 4 5

The implementations train on the same text and batches for the same preset and seed, and eager and
fused apply the same dropout masks. The training is that of `irongpt train` without checkpoints and
samples. Its seconds include neither the evaluations, which have seconds of their own, nor the first
steps, which compile the kernels.
"""

import argparse
import itertools
import math
import time
from typing import Any

import torch

from benchmarks.measure import result_file
from irongpt import device as devices
from irongpt import ops, timing
from irongpt.config import PRESETS, GPTConfig, TrainConfig
from irongpt.cuda_graph import WARMUP
from irongpt.data import corpus
from irongpt.data.tokenizer import CharTokenizer
from irongpt.errors import UserError
from irongpt.model import GPT
from irongpt.training.trainer import Trainer

TARGETS = {"iron": 1.38, "fast": 1.38, "nano": 1.80}
LIMIT = {"cuda": 600.0, "cpu": 100.0}  # seconds per training


def train(
    name: str,
    setting: tuple[GPTConfig, TrainConfig, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    target: float | None,
    limit: float,
) -> dict[str, Any]:
    """Trains until the last step, the target loss or the limit in seconds, and returns a row."""
    config, recipe, ids = setting
    module = ops.load(name, device, config)
    torch.manual_seed(recipe.seed)
    trainer = Trainer(GPT(config, module).to(device), ids, recipe, device, dtype)
    recent: list[torch.Tensor] = []
    curve: list[list[float]] = []  # step, seconds, mean training loss since the last entry
    evaluated: list[list[float]] = []  # step, seconds, validation loss
    # Not timed: compilation, and on a GPU the capture of the step.
    warm = min(recipe.iters, WARMUP + 2 if device.type == "cuda" else 1)
    start = time.perf_counter()
    for _ in range(warm):
        recent.append(trainer.train_step())
    devices.synchronize(device)
    warm_seconds = time.perf_counter() - start
    seconds, evaluation, reached, finite = 0.0, 0.0, False, True
    while trainer.step < recipe.iters and seconds + evaluation < limit and not reached and finite:
        start = time.perf_counter()
        until = min(recipe.iters, (trainer.step // recipe.log_every + 1) * recipe.log_every)
        while trainer.step < until:
            recent.append(trainer.train_step())
        losses = torch.stack(recent)[:, 0].tolist()
        seconds += time.perf_counter() - start
        curve.append([trainer.step, seconds, sum(losses) / len(losses)])
        recent, finite = [], math.isfinite(losses[-1])
        if trainer.step % recipe.eval_every == 0 or trainer.step == recipe.iters:
            start = time.perf_counter()
            loss = trainer.evaluate()
            evaluation += time.perf_counter() - start
            assert loss is not None
            evaluated.append([trainer.step, seconds, loss])
            reached = target is not None and loss <= target
    tokens_per_s = (trainer.step - warm) * trainer.tokens_per_step() / seconds
    return dict(
        dtype=devices.dtype_name(dtype), steps=trainer.step, seconds=seconds, warm_steps=warm,
        warm_seconds=warm_seconds, evaluation_seconds=evaluation, tokens_per_s=tokens_per_s,
        target=target, reached=reached, finite=finite, curve=curve, evaluated=evaluated,
    )  # fmt: skip


def line(run: dict[str, Any]) -> str:
    if "skipped_reason" in run:
        return f"{run['run']:22} -  {run['skipped_reason']}"
    loss = f"training loss {run['curve'][-1][2]:.4f}" if run["curve"] else "no loss"
    if run["evaluated"]:
        loss += f", validation {run['evaluated'][-1][2]:.4f}"
    text = f"{run['run']:22} {run['steps']} steps in {run['seconds']:.1f} s: {loss}"
    if run["target"] is not None:
        text += f"; {run['target']} {'reached' if run['reached'] else 'not reached'}"
    return text + ("" if run["finite"] else "; STOPPED: the loss is not finite")


def recipe_of(preset: str, seed: int | None, args: argparse.Namespace) -> TrainConfig:
    recipe = dict(PRESETS[preset].train)
    if args.iters or args.section == "runs":
        recipe["iters"] = args.iters or 300
    often = 250 if args.section == "target" else recipe["iters"]
    recipe["eval_every"] = min(recipe["eval_every"], often)
    if seed is not None:
        recipe["seed"] = seed
    return TrainConfig(**recipe)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="time complete trainings")
    parser.add_argument("--section", choices=["runs", "target"], default="runs")
    usual = "[iron; target: fast iron; CPU: nano]"
    parser.add_argument("--preset", nargs="+", choices=list(PRESETS), help=usual)
    parser.add_argument("--ops", nargs="+", help="[fused builtin eager; target, CPU: no eager]")
    parser.add_argument("--seeds", nargs="+", type=int, help="one training per seed [the preset's]")
    parser.add_argument("--dtype", choices=["auto", *devices.DTYPES], default="auto")
    parser.add_argument("--iters", type=int, help="steps [300; target: the preset's]")
    parser.add_argument("--data", help="as in irongpt train [war-and-peace]")
    parser.add_argument("--target-loss", type=float)
    parser.add_argument("--limit", type=float, help="seconds for each training [600, CPU 100]")
    result_file.add_options(parser)
    args = parser.parse_args(argv)
    device = devices.pick(args.device)
    dtype = devices.precision(args.dtype, device).dtype
    gpu, to_target = device.type == "cuda", args.section == "target"
    presets = args.preset or ((["fast"] if to_target else []) + ["iron"] if gpu else ["nano"])
    chosen = list(itertools.product(presets, args.seeds or [None]))
    recipes = {pair: recipe_of(*pair, args) for pair in chosen}
    text = corpus.load(args.data, say=print)
    tokenizer = CharTokenizer.from_text(text.text)
    ids = tokenizer.encode(text.text)
    devices.make_deterministic()
    modules = args.ops or ["fused", "builtin", *(["eager"] if gpu or not to_target else [])]
    with result_file.Section(args.section, device, args) as section:
        section.put(preset=", ".join(presets), text=text.name, text_sha256=text.sha256, rows=[])
        for (preset, seed), name in itertools.product(chosen, modules):
            config = GPTConfig(vocab_size=tokenizer.vocab_size, **PRESETS[preset].model)
            setting = config, recipes[preset, seed], ids
            target = (args.target_loss or TARGETS[preset]) if to_target else None
            words = [preset, name, *([] if seed is None else [f"seed {seed}"])]
            run: dict[str, Any] = {"run": ", ".join(words), "preset": preset, "ops": name}
            try:
                run |= train(name, setting, dtype, device, target, args.limit or LIMIT[device.type])
            except UserError as e:
                run["skipped_reason"] = str(e)
            except Exception as e:  # the other trainings continue
                run["skipped_reason"] = timing.reason(e)
            print(line(run), flush=True)
            section.put(rows=[*section.values["rows"], run])
    print(f"written to {section.path}")


if __name__ == "__main__":
    main()
