"""Training as it is: milliseconds a step, tokens/s, MFU, memory, and where the step's time goes.

    python -m benchmarks.train                    iron on a GPU, nano on a CPU
    python -m benchmarks.train --nanogpt FOLDER   and the same work by a checkout of nanoGPT

    eager, builtin, fused    the ops that `irongpt train --ops` offers
    textbook                 builtin with attention written out: what a model costs without kernels
    ... compiled             torch.compile of the model's loss in mode default
    ... max-autotune         in that mode, which has CUDA graphs of its own
    ... graph                the whole step as one CUDA graph
    ... as trained           that, with deterministic algorithms: what `irongpt train` runs
    nanoGPT                  its model and AdamW, on the same batches; beside it builtin AdamW,
                             which does the same work where our preset has another optimizer

A step is `Trainer.train_step`: batch, forward, backward, unscale, clip, AdamW. The variants take
turns, some steps each, so that a card that gets hot slows all of them. Weights are fresh ones.

Of the step's matrix products each shape is timed alone; what is left of a step is all else. The
floor, `computed`, is their time and the least bytes of the other ops at this device's measured copy
bandwidth.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from irongpt_kernels import builtin, eager

from benchmarks import environment, products, results, timing
from benchmarks.providers import Textbook
from benchmarks.variants import Variant, nanogpt, peak_of, trained
from irongpt import corpus, ops
from irongpt import device as devices
from irongpt.config import PRESETS, GPTConfig, TrainConfig
from irongpt.errors import UserError
from irongpt.tokenizer import CharTokenizer

STEPS = {"cuda": 10, "cpu": 2}  # in a turn of a variant
TURNS = {"cuda": 8, "cpu": 4}
BUDGET = {"cuda": 1200.0, "cpu": 150.0}  # seconds, after which no variant is added


def variants(
    dtype: torch.dtype, device: torch.device, only: list[str] | None, checkout: Path | None
) -> Iterator[tuple[str, Callable[..., Variant]]]:
    """What is timed in one dtype: the cheap ones first, those that compile for minutes last."""
    gpu = device.type == "cuda"
    found: list[tuple[str, Callable[..., Variant]]] = []

    def add(name: str, module: Any, **options: Any) -> None:
        def make(setting: tuple[Any, ...]) -> Variant:
            chosen = ops.load("fused", device, setting[0]) if module is None else module
            return trained(setting, chosen, dtype, device, **options)

        found.append((name, make))

    if gpu or (only and "fused" in only):
        add("fused", None)
    add("builtin", builtin)
    add("textbook", Textbook)
    add("eager", eager)
    if checkout is not None:
        found.append(("nanoGPT", lambda s: nanogpt(s, checkout, dtype, device)))
        add("builtin AdamW", builtin, optimizer="adamw")
    if gpu:
        add("fused graph", None, graph=True)
        add("builtin graph", builtin, graph=True)
        add("textbook graph", Textbook, graph=True)
    if gpu:
        add("fused as trained", None, graph=True, deterministic=True)
        add("builtin as trained", builtin, graph=True, deterministic=True)
    add("builtin compiled", builtin, mode="default")
    if gpu:
        add("textbook compiled", Textbook, mode="default")
        add("fused compiled", None, mode="default")
        add("builtin compiled graph", builtin, mode="default", graph=True)
        add("fused compiled graph", None, mode="default", graph=True)
        add("builtin max-autotune", builtin, mode="max-autotune")
        add("textbook max-autotune", Textbook, mode="max-autotune")
    yield from (pair for pair in found if only is None or pair[0] in only)


def measure(
    section: results.Section,
    setting: tuple[Any, ...],
    dtype: torch.dtype,
    device: torch.device,
    args: argparse.Namespace,
    until: float,
) -> None:
    """Adds a row for every variant: at once, then again with each turn."""
    name_of = str(dtype)[6:]
    ready: dict[str, Variant] = {}
    samples: dict[str, list[float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    before = list(section.values["rows"])
    steps = args.steps or STEPS[device.type]

    def take(name: str) -> None:
        samples[name].append(ready[name].seconds_a_step(steps))
        rows[name] |= summary(samples[name], setting, section.values["roofs"]["peak"][name_of])
        section.put(rows=before + list(rows.values()))

    for name, make in variants(dtype, device, args.variants, args.nanogpt):
        rows[name] = {"variant": name, "dtype": name_of}
        if time.perf_counter() > until:
            rows[name]["none_because"] = "the time for this benchmark was over"
            continue
        start = time.perf_counter()
        try:
            with peak_of(device) as peak:
                ready[name] = make(setting)
                ready[name].warm_up()
            samples[name] = []
            rows[name]["first_seconds"] = time.perf_counter() - start
            rows[name] |= peak | {"launches": ready[name].launches()}
            take(name)
        except UserError as e:
            rows[name]["none_because"] = str(e)
        except Exception as e:  # one that cannot run here is a result
            rows[name]["none_because"] = timing.reason(e)
            ready.pop(name, None)
        print(line(rows[name]), flush=True)
    names = [name for name in ready if samples.get(name)]
    for turn in range(1, args.turns or TURNS[device.type]):
        order = names[turn % len(names) :] + names[: turn % len(names)] if names else []
        for name in order:
            take(name)
    section.put(rows=before + list(rows.values()))
    for name in names:
        print(line(rows[name]), flush=True)


def summary(samples: list[float], setting: tuple[Any, ...], peak: float) -> dict[str, Any]:
    model, train = setting[0], setting[1]
    t = timing.Timing(samples, False)
    tokens = train.batch_size * model.context
    return {
        "seconds": t.median,
        "iqr": t.iqr,
        "samples": len(samples),
        "tokens_per_s": tokens / t.median,
        "mfu": tokens / t.median * model.flops_per_token() / peak,
    }


def line(row: dict[str, Any]) -> str:
    head = f"{row['dtype']:9} {row['variant']:22}"
    if "seconds" not in row:
        return f"{head} -  {row.get('none_because', '')[:90]}"
    memory = f"{row['peak_bytes'] / 2**30:6.2f} GiB" if row.get("peak_bytes") else ""
    launches = f"{row['launches']:5} launches" if row.get("launches") else ""
    return (
        f"{head} {row['seconds'] * 1e3:9.2f} ms +- {row['iqr'] * 1e3:6.2f} "
        f"{row['tokens_per_s']:11,.0f} tokens/s  MFU {row['mfu']:6.1%} {memory} {launches}"
    )


def setting_of(preset: str, batch_size: int | None) -> tuple[GPTConfig, TrainConfig, torch.Tensor]:
    """Model, recipe and token ids. Speed does not depend on the text: the built-in one will do."""
    text = corpus.load("python-docs", say=lambda line: None).text[:400_000]
    tokenizer = CharTokenizer.from_text(text)
    model = GPTConfig(vocab_size=tokenizer.vocab_size, **PRESETS[preset].model)
    recipe = dict(PRESETS[preset].train)
    if batch_size is not None:
        recipe["batch_size"] = batch_size
    return model, TrainConfig(**recipe), tokenizer.encode(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="training steps of every variant")
    parser.add_argument("--preset", choices=list(PRESETS), help="[iron on a GPU, else nano]")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="those only")
    parser.add_argument("--dtypes", nargs="+", choices=list(devices.DTYPES))
    parser.add_argument("--batch-size", type=int, help="windows a step [the preset's]")
    parser.add_argument("--steps", type=int, help="in a turn [10, 2 on a CPU]")
    parser.add_argument("--turns", type=int, help="of each variant [8, 4 on a CPU]")
    parser.add_argument("--budget", type=float, help="seconds after which no variant is added")
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT")
    results.add_options(parser)
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
    with results.Section("train", device, args) as section:
        roofs = environment.roofs(device, dtypes)
        roofs["peak"] = {str(d)[6:]: devices.peak_flops(device, d)[0] for d in dtypes}
        section.put(
            preset=preset,
            model=vars(setting[0]),
            batch_size=setting[1].batch_size,
            roofs=roofs,
            products={},
            rows=[],
        )
        for i, dtype in enumerate(dtypes):
            until = began + budget * (1.0 if i == len(dtypes) - 1 else 0.65)
            found = products.measure(setting[0], setting[1].batch_size, dtype, device)
            found |= products.floor(
                setting[0], setting[1].batch_size, dtype, found["seconds"], roofs
            )
            section.put(products=section.values["products"] | {str(dtype)[6:]: found})
            print(products.line(str(dtype)[6:], found), flush=True)
            measure(section, setting, dtype, device, args, until)
    print(f"written to {section.path}")


if __name__ == "__main__":
    main()
