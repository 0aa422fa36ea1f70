"""`irongpt tune`: launch options of the kernels, measured on this GPU. It runs only when asked for.

A kernel is launched with the default options and with each candidate, by the op and at the shape of
the preset's training step. A candidate is rejected if its results on a small batch exceed the
tolerance, or if the kernel that is compiled for the preset's batch spills registers or fails. The
others are timed, interleaved. The fastest is timed again with the default, and it is saved if it is
faster by more than the noise both times.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from irongpt_kernels import Ops, eager, op_inputs, tolerance
from irongpt_kernels.op_inputs import SEED, Shape, Tensors
from irongpt_kernels.op_specs import SPECS, OpSpec
from irongpt_kernels.runtime import emulate, launch_table

from irongpt import device as devices
from irongpt import launch_cache as cache
from irongpt import ops, timing
from irongpt.compare.ops import factor
from irongpt.config import PRESETS, GPTConfig, check
from irongpt.console import say
from irongpt.errors import one_line

DEFAULT = 0  # the number of the default options among the candidates
ROUNDS, QUICK_ROUNDS = 15, 6
QUICK_EVERY = 3  # --quick measures every third candidate
COPIES = 16  # the most copies of the inputs
MIN_GAIN = 0.02  # a smaller gain does not justify other rounding
FUNCTIONS = {  # kernel: the op that launches it, and the function that is timed
    "attention forward": ("causal_attention_packed", "attention._fwd_kernel"),
    "attention query": ("causal_attention_packed", "attention_backward._bwd_dq_kernel"),
    "attention key": ("causal_attention_packed", "attention_backward._bwd_dkdv_kernel"),
    **dict.fromkeys(
        launch_table.HEADS, ("causal_attention_packed", "attention_head_backward._bwd_head_kernel")
    ),
    "norm forward": ("dropout_add_layer_norm", "layer_norm._fwd_kernel"),
    "norm backward": ("dropout_add_layer_norm", "layer_norm_backward._bwd_kernel"),
    "gelu forward": ("gelu", "gelu._fwd_kernel"),
    "gelu backward": ("gelu", "gelu._bwd_kernel"),
}


class Launch(NamedTuple):
    """A kernel's launch that can be repeated. spilled: bytes per thread. bytes: of its tensors."""

    again: Callable[[], object]
    spilled: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """A kernel of `launch_table.OPTION_NAMES` in a training step of this model.

    batch: the number of sequences. dtype: that of the matmuls.
    """

    kernel: str
    model: GPTConfig
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def spec(self) -> OpSpec:
        return SPECS[FUNCTIONS[self.kernel][0]]

    @property
    def key(self) -> launch_table.Key:
        C = self.model.n_embd
        by_op = {"attention": C // self.model.n_head, "norm": C, "gelu": 4 * C}
        return self.kernel, by_op[self.kernel.split()[0]], self.dtype.itemsize

    @property
    def launched(self) -> bool:
        """Whether training launches this kernel. The backward of attention is either the `attention
        head` of the context or the pair of `attention query` and `attention key`."""
        from irongpt_kernels.fused import attention_tiles

        _, size, itemsize = self.key
        T, pair = self.model.context, ["attention query", "attention key"]
        one = attention_tiles.head_options(self.device, T, size, itemsize) is not None
        backward = [attention_tiles.head_entry(T)] if one else pair
        return self.kernel in backward or self.kernel not in (*launch_table.HEADS, *pair)

    def shape(self, batch: int) -> Shape:
        m = self.model
        return Shape(batch, m.n_head, m.context, m.n_embd // m.n_head)

    def inputs(self, batch: int, seed: int = 0) -> Tensors:
        inputs, dtypes = self.spec.inputs(self.shape(batch)), op_inputs.dtypes(self.dtype)
        return op_inputs.random_inputs(inputs, dtypes, self.device, seed)

    def run(self, module: Ops, inputs: Tensors) -> Tensors:
        """The op's outputs by name, and its gradients as `d x`. Upstream gradients are random
        values that the compute dtype can hold, in the dtype of the output."""
        shape, p = self.shape(self.batch), self.model.dropout
        options = self.spec.options(shape, p, SEED) if p else {}
        upstream = partial(op_inputs.upstream, dtype=self.dtype)

        def call(x: Tensors) -> tuple[torch.Tensor, ...]:
            return self.spec.run(module, shape, x, **options)

        return op_inputs.results(call, inputs, self.spec.outputs, upstream)

    def wrong(self, module: Ops) -> list[str]:
        """The tensors whose errors exceed the tolerance, at a batch of two."""
        inputs, names = self.inputs(2, seed=1), list[str]()
        baseline = self.run(eager, inputs)
        oracle = self.run(eager, op_inputs.widened(inputs))
        for name, x in self.run(module, inputs).items():
            errors = tolerance.errors(factor(name), x, baseline[name], oracle[name])
            names += [] if all(e.ok for e in errors.values()) else [name]
        return names


@dataclass(frozen=True)
class Row:
    """A candidate. samples: seconds. rejected: the reason why it was not timed."""

    options: launch_table.Options | None  # None: the default ones
    samples: tuple[float, ...] = ()
    rejected: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def name(self) -> str:
        return ", ".join(f"{k} {v}" for k, v in (self.options or {}).items()) or "default"


def tune(
    device: str = "auto", preset: str = "iron", dtype: str = "auto", quick: bool = False
) -> int:
    """Measures every kernel with launch options, prints the results, saves the fastest options."""
    target = devices.pick(device)
    check(target.type == "cuda", "irongpt tune needs an NVIDIA GPU, whose kernels it measures")
    useless = f"{emulate.VARIABLE} is set: timings of this GPU do not apply to a T4, unset it"
    check(not emulate.enabled(), useless)
    ignored = f"{cache.VARIABLE}=off is set: the measured tiles would not be used, unset it"
    check(cache.wanted(), ignored)
    model = GPTConfig(vocab_size=1, **PRESETS[preset].model)
    chosen = devices.precision(dtype, target).dtype
    module = ops.load("fused", target, model)
    batch = int(PRESETS[preset].train["batch_size"])
    name = devices.dtype_name(chosen)
    say(f"tuning for {preset}, {batch} sequences in {name}, on {devices.describe(target)}")
    say("this takes minutes, most of them for compiling; the GPU should have nothing else to do")
    entries = list(cache.load(target).entries)
    for kernel in FUNCTIONS:
        work = Work(kernel, model, batch, chosen, target)
        if not work.launched:
            continue
        found = candidates(work, quick)
        rows = measure(work, module, found, QUICK_ROUNDS if quick else ROUNDS)
        say("\n" + table(work, rows))
        entries = updated(entries, work, rows)
    file = cache.save(target, entries)
    if entries:
        digest = launch_table.table_digest(launch_table.table_of(entries))
        say(f"\nsaved in {file} (table {digest}) for later runs. Different tiles change the order")
        say(f"of summation and so the rounding. {cache.VARIABLE}=off selects the default tiles")
    else:
        say("\nno tiles are faster than the default by more than the noise: nothing is saved")
    return 0


def candidates(work: Work, quick: bool = False) -> list[launch_table.Options]:
    """The options that may be launched in place of the default."""
    from irongpt_kernels.aot import tiles
    from irongpt_kernels.runtime import launch

    options = tiles.launches(work.key, launch.architecture(work.device))
    return options[::QUICK_EVERY] if quick else options


def measure(work: Work, module: Ops, found: list[launch_table.Options], rounds: int) -> list[Row]:
    """A row for the default, and one for each candidate. Leaves the default in use."""
    inputs = [work.inputs(work.batch)]
    rows = [Row(options) for options in [None, *found]]
    launches: dict[int, list[Launch]] = {}

    def update(i: int, samples: Sequence[float] = (), rejected: str = "") -> None:
        check(not rejected or i != DEFAULT, f"{work.kernel} with the default tiles: {rejected}")
        rows[i] = Row(rows[i].options, (*samples,), rejected)

    try:
        for i, row in enumerate(rows):
            launch_table.use(work.device, {} if row.options is None else {work.key: row.options})
            try:
                made = _prepared(work, module, inputs)
            except Exception as e:  # a candidate that cannot run is a result
                made = one_line(e)[:100]
            if isinstance(made, str):
                update(i, rejected=made)
            else:
                launches[i] = made
    finally:
        launch_table.use(work.device, {})

    def sample(numbers: list[int], rounds: int) -> None:
        calls = {str(i): lambda n, made=launches[i]: made[n].again() for i in numbers}
        with timing.stream(work.device):
            timings = timing.measure(calls, len(inputs), work.device, rounds)
        for i, t in timings.items():
            update(int(i), **(dict(rejected=t) if isinstance(t, str) else dict(samples=t.samples)))

    sample(list(launches), rounds)
    if (best := winner(rows)) is not None:
        # The lowest of many medians is partly luck, so it is measured once more.
        sample([DEFAULT, rows.index(best)], 2 * rounds)
    return rows


def _prepared(work: Work, module: Ops, inputs: list[Tensors]) -> list[Launch] | str:
    """A launch for each copy of the inputs, or the reason why the options are rejected.

    Adds the copies to `inputs`, which begins with one. Raises what a launch raises.
    """
    if wrong := work.wrong(module):
        return f"exceeds tolerance in {', '.join(wrong)}"
    first = record(work, module, inputs[0])
    if first.spilled and launch_table.digest(work.device):
        return f"spills {first.spilled} bytes"
    if len(inputs) == 1:
        copies = min(COPIES, timing.copies(first.bytes, work.device))
        inputs += [work.inputs(work.batch, seed=i) for i in range(1, copies)]
    return [first, *(record(work, module, x) for x in inputs[1:])]


def record(work: Work, module: Ops, inputs: Tensors) -> Launch:
    """The launch of the work's kernel that the op makes. Raises what the op raises."""
    from irongpt_kernels.aot import sass
    from triton.runtime.jit import JITFunction

    wanted, original = FUNCTIONS[work.kernel][1], JITFunction.run
    made: list[Launch] = []

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = original(self, *args, **kwargs)
        if f"{self.fn.__module__.split('.')[-1]}.{self.fn.__name__}" == wanted:
            touched = {x.data_ptr(): x.nbytes for x in args if isinstance(x, torch.Tensor)}
            spilled = sass.usage(compiled.asm["cubin"])[1]
            again = lambda: original(self, *args, **kwargs)  # noqa: E731
            made.append(Launch(again, spilled, sum(touched.values())))
        return compiled

    with patch.object(JITFunction, "run", run):
        work.run(module, inputs)
    return made[0]


def beats(candidate: tuple[float, ...], default: tuple[float, ...]) -> bool:
    """Whether a gain is more than noise: the third quartile of the candidate's samples is below the
    first of the default's, and its median is lower by more than the share MIN_GAIN."""
    (_, median, high), (low, slower, _) = (
        statistics.quantiles(x, n=4) for x in (candidate, default)
    )
    return high < low and median < (1 - MIN_GAIN) * slower


def winner(rows: list[Row]) -> Row | None:
    """The fastest, if it beats the default by more than the noise."""
    best = min((row for row in rows if row.samples), key=lambda row: row.median)
    return best if beats(best.samples, rows[DEFAULT].samples) else None


def updated(entries: list[dict[str, Any]], work: Work, rows: list[Row]) -> list[dict[str, Any]]:
    """The entries, with the new result for a kernel in place of its former one."""
    names = ("kernel", "size", "itemsize")
    key = dict(zip(names, work.key, strict=True))
    kept = [e for e in entries if {name: e[name] for name in names} != key]
    if (best := winner(rows)) is not None:
        us, default_us = (round(1e6 * row.median, 2) for row in (best, rows[DEFAULT]))
        kept.append(key | dict(options=best.options, us=us, default_us=default_us))
    return kept


def table(work: Work, rows: list[Row]) -> str:
    """The timed candidates, fastest first, then the others."""
    kernel, size, _ = work.key
    meaning = "head dimension" if kernel.startswith("attention") else "columns"
    lines = [f"{kernel}, {meaning} {size}: us, relative to the default"]
    best = winner(rows)
    for row in sorted((r for r in rows if r.samples), key=lambda r: r.median):
        mark = "  saved" if row is best else ""
        ratio = row.median / rows[DEFAULT].median
        lines.append(f"  {row.name:66} {1e6 * row.median:9.2f} {ratio:6.2f}{mark}")
    return "\n".join(lines + [f"  {row.name:66} {row.rejected}" for row in rows if row.rejected])
