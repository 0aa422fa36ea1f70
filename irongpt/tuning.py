"""`irongpt tune`: launch options of the kernels, measured on this GPU. It runs only when asked for.

A kernel's candidates and the default options run the same op as in a training of the preset: first
on a small batch, where a candidate whose results exceed tolerance is out, then compiled as it is
launched, where one that spills or does not fit is out, then timed, interleaved. The fastest is
timed once more against the default, and it is kept if it is faster beyond the noise both times.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from irongpt.config import PRESETS, GPTConfig, check
from irongpt.console import say

DEFAULT = 0  # the number of the default options among the candidates
ROUNDS, QUICK_ROUNDS = 15, 6
QUICK_EVERY = 3  # of so many candidates one is measured
COPIES = 16  # of the inputs at most
MIN_GAIN = 0.02  # of the time: less is not worth sums in another order
FUNCTIONS = {  # kernel: the op that launches it, and the function that is timed
    "attention forward": ("causal_attention_packed", "attention._fwd_kernel"),
    "attention query": ("causal_attention_packed", "attention_backward._bwd_dq_kernel"),
    "attention key": ("causal_attention_packed", "attention_backward._bwd_dkdv_kernel"),
    "norm forward": ("dropout_add_layer_norm", "dropout_add_layer_norm._fwd_kernel"),
    "norm backward": ("dropout_add_layer_norm", "layer_norm_backward._bwd_kernel"),
    "gelu forward": ("gelu", "gelu._fwd_kernel"),
    "gelu backward": ("gelu", "gelu._bwd_kernel"),
}


class Launch(NamedTuple):
    """A kernel's launch, with its arguments, that can be repeated. spilled: bytes per thread.
    bytes: of the tensors that it was given."""

    again: Callable[[], object]
    spilled: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """A kernel of `launch_table.KNOBS` in the training of a model. dtype: of the matmuls."""

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

    def shape(self, batch: int) -> Shape:
        m = self.model
        return Shape(batch, m.n_head, m.context, m.n_embd // m.n_head)

    def inputs(self, batch: int, seed: int = 0) -> Tensors:
        inputs, dtypes = self.spec.inputs(self.shape(batch)), op_inputs.dtypes(self.dtype)
        return op_inputs.random_inputs(inputs, dtypes, self.device, seed)

    def run(self, module: Ops, inputs: Tensors) -> Tensors:
        """The op's outputs by name, and its gradients as `d x`. Upstream gradients are random
        values of the compute dtype, whatever the inputs are."""
        shape, p = self.shape(self.batch), self.model.dropout
        options = self.spec.options(shape, p, SEED) if p else {}

        def upstream(i: int, x: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator(self.device).manual_seed(90 + i)
            g = torch.randn(x.shape, generator=generator, device=self.device)
            return g.to(self.dtype).to(x.dtype)

        def call(x: Tensors) -> tuple[torch.Tensor, ...]:
            return self.spec.run(module, shape, x, **options)

        return op_inputs.results(call, inputs, self.spec.outputs, upstream)


class AccuracyCheck:
    """Holds an op to the tolerance, at the model's shape and a batch of two."""

    def __init__(self, work: Work) -> None:
        self.work, self.inputs = work, work.inputs(2, seed=1)
        self.baseline = work.run(eager, self.inputs)
        self.oracle = work.run(eager, {n: x.double() for n, x in self.inputs.items()})

    def wrong(self, module: Ops) -> list[str]:
        """The tensors whose errors exceed the tolerance."""
        found = []
        for name, x in self.work.run(module, self.inputs).items():
            factor = tolerance.GRADIENTS if name.startswith("d ") else tolerance.OUTPUTS
            errors = tolerance.errors(factor, x, self.baseline[name], self.oracle[name])
            found += [] if all(e.ok for e in errors.values()) else [name]
        return found


@dataclass(frozen=True)
class Row:
    """A candidate; None are the default options. out: why it was not timed. samples: seconds."""

    options: launch_table.Options | None
    samples: tuple[float, ...] = ()
    out: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def tune(device: str, preset: str, dtype: str, quick: bool) -> int:
    """Measures every kernel that has a choice, prints the results and keeps the winners."""
    target = devices.pick(device)
    check(
        target.type == "cuda",
        "irongpt tune measures on an NVIDIA GPU, and there is none: the default tiles need no "
        "tuning",
    )
    check(
        not emulate.on(),
        f"{emulate.VARIABLE} is set: measurements of this GPU are of no use to a T4, unset it",
    )
    check(
        cache.wanted(),
        f"{cache.VARIABLE}=off is set: the measured tiles would not be used, unset it",
    )
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
        found = candidates(work, quick)
        rows = measure(work, module, found, QUICK_ROUNDS if quick else ROUNDS)
        say("\n" + table(work, rows))
        entries = updated(entries, work, rows)
    file = cache.save(target, entries)
    if entries:
        digest = launch_table.table_digest(launch_table.table_of(entries))
        say(f"\nkept in {file}: table {digest}, for every run that starts from now on. Other tiles")
        say(f"add up in another order. {cache.VARIABLE}=off, or no such file, runs the default")
    else:
        say("\nno tiles are faster than the default beyond the noise: nothing is kept")
    return 0


def candidates(work: Work, quick: bool = False) -> list[launch_table.Options]:
    """The options that may be launched in place of the default."""
    from irongpt_kernels.aot import tiles
    from irongpt_kernels.runtime import launch

    found = tiles.launches(work.key, launch.architecture(work.device))
    return found[::QUICK_EVERY] if quick else found


def measure(work: Work, module: Ops, found: list[launch_table.Options], rounds: int) -> list[Row]:
    """A row for the default, and one for each candidate. Leaves the default in use."""
    accuracy, inputs = AccuracyCheck(work), [work.inputs(work.batch)]
    rows = [Row(options) for options in [None, *found]]
    launches: dict[int, list[Launch]] = {}
    try:
        for i, row in enumerate(rows):
            launch_table.use(work.device, {} if row.options is None else {work.key: row.options})
            try:
                launches[i] = _prepared(work, module, accuracy, inputs)
            except Exception as e:  # a candidate that cannot run is a result
                check(i != DEFAULT, f"{work.kernel} with the default tiles: {_brief(e)}")
                rows[i] = replace(row, out=_brief(e))
    finally:
        launch_table.use(work.device, {})

    def sample(numbers: list[int], rounds: int) -> None:
        calls = {str(i): lambda n, made=launches[i]: made[n].again() for i in numbers}
        with timing.stream(work.device):
            timings = timing.measure(calls, len(inputs), work.device, rounds)
        for i, t in timings.items():
            options = rows[int(i)].options
            ran = isinstance(t, timing.Timing) or i != str(DEFAULT)
            check(ran, f"{work.kernel} with the default tiles: {t}")
            rows[int(i)] = (
                Row(options, out=t) if isinstance(t, str) else Row(options, (*t.samples,))
            )

    sample(list(launches), rounds)
    if (best := winner(rows)) is not None:
        # The least of many medians is low by luck too: it has to be shown without the others.
        sample([DEFAULT, rows.index(best)], 2 * rounds)
    return rows


def _prepared(
    work: Work, module: Ops, accuracy: AccuracyCheck, inputs: list[Tensors]
) -> list[Launch]:
    """A launch for each copy of the inputs. Raises for options that are wrong, spill or cannot
    run."""
    if wrong := accuracy.wrong(module):
        raise _Out(f"exceeds tolerance in {', '.join(wrong)}")
    first = record(work, module, inputs[0])
    if first.spilled and launch_table.digest(work.device):
        raise _Out(f"spills {first.spilled} bytes")
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


class _Out(Exception):  # noqa: N818
    pass


def _brief(e: Exception) -> str:
    text = str(e) if isinstance(e, _Out) else f"{type(e).__name__}: {e}"
    return " ".join(text.split())[:100]


def beats(candidate: tuple[float, ...], default: tuple[float, ...]) -> bool:
    """Whether a gain is more than noise: three quarters of the candidate's samples are below three
    quarters of the other's, and the medians are MIN_GAIN apart."""
    faster = statistics.median(candidate) < (1 - MIN_GAIN) * statistics.median(default)
    return (
        faster and statistics.quantiles(candidate, n=4)[2] < statistics.quantiles(default, n=4)[0]
    )


def winner(rows: list[Row]) -> Row | None:
    """The fastest, if it beats the default beyond the noise."""
    best = min((row for row in rows if row.samples), key=lambda row: row.median)
    return best if beats(best.samples, rows[DEFAULT].samples) else None


def updated(entries: list[dict[str, Any]], work: Work, rows: list[Row]) -> list[dict[str, Any]]:
    """The entries, with the result for a kernel in place of its former one."""
    names = ("kernel", "size", "itemsize")
    key = dict(zip(names, work.key, strict=True))
    kept = [e for e in entries if {name: e[name] for name in names} != key]
    if (best := winner(rows)) is not None:
        times = dict(us=1e6 * best.median, default_us=1e6 * rows[DEFAULT].median)
        rounded = {name: round(x, 2) for name, x in times.items()}
        kept.append(key | dict(options=best.options) | rounded)
    return kept


def table(work: Work, rows: list[Row]) -> str:
    """The timed candidates, fastest first, then the others."""
    kernel, size, _ = work.key
    what = "head dimension" if kernel.startswith("attention") else "columns"
    lines = [f"{kernel}, {what} {size}: us, relative to the default"]
    best = winner(rows)
    for row in sorted((r for r in rows if r.samples), key=lambda r: r.median):
        mark = "  kept" if row is best else ""
        ratio = row.median / rows[DEFAULT].median
        lines.append(f"  {_named(row):44} {1e6 * row.median:9.2f} {ratio:6.2f}{mark}")
    return "\n".join(lines + [f"  {_named(row):44} {row.out}" for row in rows if row.out])


def _named(row: Row) -> str:
    if row.options is None:
        return "default"
    short = dict(
        BLOCK_M="M", BLOCK_N="N", num_warps="warps", num_stages="stages", maxnreg="registers"
    )
    return ", ".join(f"{short.get(k, k)} {v}" for k, v in row.options.items())
