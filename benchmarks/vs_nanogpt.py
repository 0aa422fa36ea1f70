"""Times the nano preset against nanoGPT's CPU recipe.

    git clone https://github.com/karpathy/nanoGPT
    make bench-nano NANOGPT=nanoGPT

Three processes run on War and Peace, one after the other; the first nine tenths of the text are for
training, the rest is for validation. Their seconds are wall time from start to exit:

    nanoGPT     its unmodified train.py: 4 layers, 4 heads, width 128, context 64, batch 12, 2,000
                iterations, AdamW 1e-3 to 1e-4, no dropout, no compilation
    to 1.80     irongpt train --preset nano --target-loss 1.80
    nano        irongpt train --preset nano

Each program evaluates its own validation loss: nanoGPT on 20 random batches of 12 sequences of 64
characters, ours on fixed sequences of nano's context. `make bench-nano` then times training steps
of iron and of nanoGPT's model of the same shape, by `benchmarks.training`.
"""

import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import environment, result_file
from benchmarks.measure.rows import NanoRow
from irongpt.data import corpus
from irongpt.data.batches import Tokens
from irongpt.data.tokenizer import CharTokenizer

# config/train_shakespeare_char.py, with what nanoGPT's README says to set on a CPU.
RECIPE = (
    "config/train_shakespeare_char.py --dataset=wp --out_dir=out-wp --device=cpu --compile=False "
    "--dtype=float32 --eval_iters=20 --eval_interval=250 --log_interval=100 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
    "--dropout=0.0"
).split()


def main(argv: list[str] | None = None) -> None:
    parser = result_file.parser("benchmarks.vs_nanogpt", __doc__)
    help = "checkout of nanoGPT (required)"
    parser.add_argument("--nanogpt", metavar="FOLDER", type=Path, required=True, help=help)
    result_file.add_options(parser.add_argument, device=False)
    args = parser.parse_args(argv)
    checkout = args.nanogpt.resolve()
    if not (checkout / "train.py").is_file():
        parser.error(f"{checkout} is not a checkout of nanoGPT: train.py is missing")
    text = corpus.load("war-and-peace", say=print)
    device = torch.device("cpu")
    with (
        result_file.Section("nano", device, args) as section,
        tempfile.TemporaryDirectory() as scratch,
    ):
        section.put(nanogpt=environment.git_commit(checkout), rows=[])
        folder = Path(scratch)
        for measure in (
            lambda: nanogpt(folder, checkout, text.text),
            lambda: irongpt("to 1.80", folder, "--target-loss", "1.80"),
            lambda: irongpt("nano", folder),
        ):
            row = measure()
            section.put(rows=[*section.values["rows"], row])
            print(json.dumps(row.to_json()), flush=True)


def nanogpt(scratch: Path, checkout: Path, text: str) -> NanoRow:
    """A run of nanoGPT's train.py in a folder with links to its files."""
    data = scratch / "data" / "wp"
    data.mkdir(parents=True)
    tokenizer = CharTokenizer.from_text(text)
    tokens = Tokens.of(tokenizer.encode(text))
    for name, ids in (("train", tokens.train), ("val", tokens.val)):
        ids.numpy().astype("uint16").tofile(data / f"{name}.bin")
    with open(data / "meta.pkl", "wb") as f:  # the format that nanoGPT reads
        pickle.dump({"vocab_size": tokenizer.vocab_size}, f)
    for name in ("train.py", "model.py", "configurator.py", "config"):
        (scratch / name).symlink_to(checkout / name)
    out, row = run("nanoGPT", [sys.executable, "train.py", *RECIPE], scratch)
    losses = re.findall(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", out)
    row.curve = [[int(step), float(loss)] for step, loss in losses]
    row.validation_loss = row.curve[-1][1]
    return row


def irongpt(name: str, scratch: Path, *flags: str) -> NanoRow:
    """A run of `irongpt train` with the nano preset."""
    folder = scratch / name.replace(" ", "-")
    command = [sys.executable, "-m", "irongpt", "train", "--preset", "nano", "--data"]
    _, row = run(name, [*command, "war-and-peace", "--out", str(folder), *flags], Path())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [r for r in records if r["val_loss"] is not None]
    row.curve = [[r["step"], r["val_loss"], round(r["seconds"], 1)] for r in evaluated]
    row.validation_loss = evaluated[-1]["val_loss"]
    row.tokens_per_s = statistics.median(r["tokens_per_s"] for r in records)
    return row


def run(name: str, command: list[str], folder: Path) -> tuple[str, NanoRow]:
    """Runs a process. Returns its stdout, and a row with its wall time and peak memory."""
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = round(time.perf_counter() - start, 1)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed:\n{out}")
    megabytes = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return out, NanoRow(name=name, seconds=seconds, peak_rss_mb=round(megabytes, 1))


if __name__ == "__main__":
    main()
