"""Times generation in tokens/s, of one sequence and of batches.

    python -m benchmarks.decode

    no cache   the model processes the complete context for every token, like nanoGPT's generate
    cached     `irongpt.generation.sample` with a KV cache, one launch per kernel
    graphed    cached, one launch of a CUDA graph per token; only on a GPU
    batched    several sequences at once, with graphs on a GPU; the tokens of all of them count

A sequence starts with one token and is never longer than the context, so no cache is refilled. The
weights are randomly initialized, because training does not change the speed. Tokens are sampled at
temperature 0.8; without a cache, PyTorch samples them. A graph is captured for every call, and its
capture is in the time, as it is for a user; `steady` leaves out the first tokens, and so the
capture. `nodes` is the number of kernels, copies and fills per token.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from irongpt_kernels.op_inputs import RING_SIZE

from benchmarks.measure import profiler, result_file
from benchmarks.measure.rows import DecodeRow
from benchmarks.presets import model_of
from irongpt import device as devices
from irongpt import ops, timing
from irongpt.config import OPS, PRESETS, SampleConfig
from irongpt.cuda_graph import Graph
from irongpt.errors import UserError
from irongpt.generation import sample
from irongpt.generation.decode import Decoder
from irongpt.model import GPT

TEMPERATURE = 0.8

Stamps = list[float]  # time of each token, in seconds


@torch.inference_mode()
def no_cache(model: GPT, dtype: torch.dtype, tokens: int) -> Stamps:
    device = model.wte.weight.device
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    stamps = []
    with devices.autocast(device, dtype):
        for _ in range(tokens):
            logits = model(ids[:, -model.config.context :])[:, -1].float() / TEMPERATURE
            ids = torch.cat((ids, logits.softmax(-1).multinomial(1)), 1)
            stamps.append(time.perf_counter())
    return stamps


def cached(model: GPT, dtype: torch.dtype, tokens: int, batch: int, graph: bool) -> Stamps:
    config, failures = SampleConfig(tokens=tokens, temperature=TEMPERATURE), Graph.failures
    generated = sample.generate_batch(model, [[0]] * batch, config, dtype, graph)
    stamps = [time.perf_counter() for _ in generated]
    if Graph.failures > failures:
        raise RuntimeError("the CUDA graph could not be captured")
    return stamps


def measure(
    ops: str, model: GPT, dtype: torch.dtype, tokens: int, batches: list[int], rounds: int
) -> list[DecodeRow]:
    """A row for each way to generate, timed interleaved. A failed one has a `skipped_reason`."""
    device = model.wte.weight.device
    gpu = device.type == "cuda"
    ways: dict[tuple[str, int], Callable[[], Stamps]] = {
        ("no cache", 1): partial(no_cache, model, dtype, tokens),
        ("cached", 1): partial(cached, model, dtype, tokens, 1, False),
    }
    if gpu:
        ways["graphed", 1] = partial(cached, model, dtype, tokens, 1, True)
    ways |= {("batched", B): partial(cached, model, dtype, tokens, B, gpu) for B in batches}
    rows = {
        (way, B): DecodeRow(ops=ops, way=way, batch=B, tokens=tokens, samples=rounds)
        for way, B in ways
    }
    calls: dict[tuple[str, int], list[Stamps]] = {key: [] for key in ways}
    model.eval()
    for _ in range(rounds + 1):
        for key, row in rows.items():
            if row.skipped_reason is not None:
                continue
            try:
                devices.synchronize(device)
                start = time.perf_counter()
                stamps = ways[key]()
                devices.synchronize(device)
                calls[key].append([start, *stamps, time.perf_counter()])
            except Exception as e:  # the other ways are still measured
                row.skipped_reason = timing.reason(e)
    for (way, B), row in rows.items():
        if row.skipped_reason is not None:
            continue
        timed = calls[way, B][1:]  # the first call warmed up
        t = timing.Timing([stamps[-1] - stamps[0] for stamps in timed], False)
        row.seconds, row.iqr = t.median / tokens, t.iqr / tokens
        row.tokens_per_s = B / row.seconds
        if tokens > RING_SIZE:
            later = statistics.median(stamps[-1] - stamps[RING_SIZE] for stamps in timed)
            row.steady_tokens_per_s = B * (tokens - RING_SIZE) / later
        if gpu and way != "no cache":
            row.nodes = nodes(model, dtype, B)
    return list(rows.values())


@torch.inference_mode()
def nodes(model: GPT, dtype: torch.dtype, batch: int) -> int | str | None:
    """The number of kernels, copies and fills per token, or the error message."""
    try:
        decoder = Decoder(model, batch, SampleConfig(temperature=TEMPERATURE), dtype, graph=False)
        decoder.prefill([[0]] * batch, range(batch))
        decoder.step()
        return profiler.counts(decoder.step, decoder.tokens.device)[0]
    except Exception as e:  # the times are valid without the count
        return timing.reason(e)


def line(row: DecodeRow) -> str:
    """A row for a terminal; its time is that of a token."""
    steady = row.steady_tokens_per_s
    later = f"{steady:,.0f} tokens/s after {RING_SIZE}" if steady else ""
    nodes = "" if row.nodes is None else f"{row.nodes} nodes"
    return row.line(f"{row.tokens_per_s:,.0f} tokens/s", later, nodes)


def main(argv: list[str] | None = None) -> None:
    parser = result_file.parser("benchmarks.decode", __doc__)
    help = "preset of the model [iron on a GPU, else nano]"
    parser.add_argument("--preset", choices=list(PRESETS), help=help)
    usual = ["builtin", "fused"]
    help = f"implementations of the ops: {', '.join(OPS)} [builtin fused]"
    parser.add_argument("--ops", nargs="+", choices=OPS, metavar="NAME", default=usual, help=help)
    help = "tokens per sequence, at most the context [the context]"
    parser.add_argument("--tokens", metavar="N", type=int, help=help)
    args, device = result_file.parsed(parser, argv)
    gpu = device.type == "cuda"
    preset = args.preset or ("iron" if gpu else "nano")
    config = model_of(preset)
    tokens = min(args.tokens or config.context, config.context)
    dtype = devices.precision("auto", device).dtype
    with result_file.Section("decode", device, args) as section:
        section.put(preset=preset, dtype=devices.dtype_name(dtype), rows=[])
        for name in args.ops:
            try:
                model = GPT(config, ops.load(name, device, config)).to(device)
            except UserError as e:
                print(f"no {name}: {e}")
                continue
            batches, rounds = ([4, 8, 64], 5) if gpu else ([8], 2)
            rows = measure(name, model, dtype, tokens, batches, rounds)
            for row in rows:
                print(line(row), flush=True)
            section.put(rows=section.values["rows"] + rows)


if __name__ == "__main__":
    main()
