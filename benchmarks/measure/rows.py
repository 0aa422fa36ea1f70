"""The rows of a result file: a dataclass for each kind of measurement.

A file holds the fields that are known: those that are None or NaN are left out. Times are in
seconds. A row without a time has a `skipped_reason`.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self

Point = list[float]  # step, seconds, loss


def known(values: dict[str, Any]) -> dict[str, Any]:
    """The values that are neither None nor NaN."""
    return {name: x for name, x in values.items() if x is not None and x == x}


@dataclass
class Accuracy:
    """share: the largest error divided by its tolerance. size, dropout: those of the case
    that was checked."""

    ok: bool
    share: float = math.inf
    size: str = ""
    dropout: float = 0.0


@dataclass(kw_only=True)
class Row:
    """iqr: the interquartile range of `seconds`; NaN if there were too few samples."""

    KEY: ClassVar[tuple[str, ...]]  # the fields by which rows of two files are matched

    skipped_reason: str | None = None
    seconds: float = math.nan
    iqr: float = math.nan

    @property
    def timed(self) -> bool:
        return not math.isnan(self.seconds)

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(getattr(self, part)) for part in self.KEY)

    def line(self, *notes: str) -> str:
        """A line for a terminal: the key, the time or the `skipped_reason`, and notes."""
        head = f"{'  '.join(self.key):72} "
        if not self.timed:
            return f"{head} -  {short(self.skipped_reason)}"
        text = f"{head} {self.seconds * 1e3:10.3f} ms +- {spread(self.iqr, 1e3):>7}"
        return "  ".join([text, *(note for note in notes if note)])

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """A row of a file. Unknown fields are ignored; those that are missing have defaults."""
        names = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in known(values).items() if k in names})

    def to_json(self) -> dict[str, Any]:
        return known(asdict(self))


@dataclass(kw_only=True)
class KernelRow(Row):
    """A provider's time for an op in one mode. backend: that of builtin's attention.

    graph: whether CUDA graphs were timed. group: providers with the same number were interleaved.
    host_seconds: the time that Python needs to launch the op. cold: whether a call finds its inputs
    outside the L2 cache.
    """

    KEY = ("op", "sweep", "size", "dtype", "dropout", "mode", "provider")

    op: str
    sweep: str
    size: str
    dtype: str
    dropout: float
    mode: str
    provider: str
    shape: dict[str, int] = field(default_factory=dict)
    backend: str | None = None
    accuracy: Accuracy | None = None
    least_bytes: int = 0
    least_flops: int = 0
    sample_seconds: list[float] = field(default_factory=list)
    graph: bool = False
    no_graph_reason: str | None = None
    group: int = 0
    host_seconds: float | None = None
    peak_bytes: int | None = None
    cold: bool | None = None

    @property
    def exceeds_tolerance(self) -> bool:
        return self.accuracy is not None and not self.accuracy.ok

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        row = super().from_json(values)
        if accuracy := values.get("accuracy"):
            row.accuracy = Accuracy(**known(accuracy))
        return row


@dataclass(kw_only=True)
class StepRow(Row):
    """A variant's time for a training step. first_seconds: to build it and to warm it up.

    kernels, launches: the numbers of kernels on the GPU and of launches by the host, in a step.
    stop_reason: why it has fewer samples than the others. group: as in KernelRow.
    """

    KEY = ("variant", "dtype")

    variant: str
    dtype: str
    group: int = 0
    stop_reason: str | None = None
    first_seconds: float = math.nan
    samples: int = 0
    tokens_per_s: float = math.nan
    mfu: float = math.nan
    peak_bytes: int | None = None
    kernels: int | None = None
    launches: int | None = None


@dataclass(kw_only=True)
class DecodeRow(Row):
    """A way to generate `tokens` tokens in each of `batch` sequences. steady_tokens_per_s: without
    the first tokens. nodes: kernels, copies and fills per token, or why there is no count."""

    KEY = ("ops", "way", "batch", "tokens")

    ops: str
    way: str
    batch: int
    tokens: int = 0
    samples: int = 0
    tokens_per_s: float = math.nan
    steady_tokens_per_s: float | None = None
    nodes: int | str | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        way = "no cache" if values["way"] == "naive" else values["way"]  # in older files
        renamed = {"seconds": values.get("seconds_per_token"), "way": way}
        return super().from_json(values | renamed)

    def to_json(self) -> dict[str, Any]:
        """`seconds` and its iqr are of one token."""
        values = super().to_json()
        return {"seconds_per_token" if k == "seconds" else k: v for k, v in values.items()}


@dataclass(kw_only=True)
class RunRow(Row):
    """A complete training run. seconds: without the warm-up and the evaluations.

    curve: the training loss. evaluated: the validation loss, bits_per_byte its last value in bits
    per byte of text. finite: whether the last training loss is a finite number.
    """

    KEY = ("run", "dtype")

    run: str
    preset: str = ""
    ops: str = ""
    dtype: str = ""
    steps: int = 0
    warm_steps: int = 0
    warm_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    tokens_per_s: float = math.nan
    target: float | None = None
    reached: bool = False
    finite: bool = True
    curve: list[Point] = field(default_factory=list)
    evaluated: list[Point] = field(default_factory=list)
    bits_per_byte: float | None = None

    @property
    def validation_loss(self) -> float | None:
        return self.evaluated[-1][2] if self.evaluated else None


@dataclass(kw_only=True)
class NanoRow(Row):
    """One process of the comparison with nanoGPT on a CPU. seconds: from start to exit."""

    KEY = ("name",)

    name: str
    validation_loss: float = math.nan
    peak_rss_mb: float = math.nan
    tokens_per_s: float | None = None
    curve: list[Point] = field(default_factory=list)


def spread(iqr: float, unit: float) -> str:
    """An interquartile range; ? if there were too few samples."""
    return "?" if math.isnan(iqr) else f"{iqr * unit:,.2f}"


def shown(value: Any) -> str:
    """A value, four digits of it if it is a float."""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def short(text: str | None) -> str:
    """At most 90 characters in one line, for a cell of a table."""
    text = " ".join((text or "").split())
    return (text if len(text) <= 90 else f"{text[:86]} ...").replace("|", "/")


KINDS: dict[str, type[Row]] = {  # by section
    "kernels": KernelRow,
    "train": StepRow,
    "decode": DecodeRow,
    "runs": RunRow,
    "target": RunRow,
    "nano": NanoRow,
}
