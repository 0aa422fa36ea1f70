"""Times interleaved training steps of several variants, and writes a row for each."""

import argparse
import time
from collections.abc import Callable, Mapping

from benchmarks.measure import result_file
from benchmarks.measure.rows import StepRow
from benchmarks.presets import Setting
from benchmarks.training.variants import Variant, peak_of
from irongpt import timing
from irongpt.errors import UserError

STEPS = {"cuda": 10, "cpu": 2}  # steps of a variant per round
ROUNDS = {"cuda": 8, "cpu": 4}
LAST_START = 0.7  # share of the time after which no further variant starts


class Steps:
    """Measures variants in one dtype, and saves their rows after each sample.

    Variants that do not fit in memory together are measured in groups, one group after the other.
    """

    def __init__(
        self, section: result_file.Section, setting: Setting, dtype: str, args: argparse.Namespace
    ) -> None:
        self.section, self.setting, self.dtype = section, setting, dtype
        self.device = section.device
        self.steps = args.steps or STEPS[self.device.type]
        self.rounds = args.rounds or ROUNDS[self.device.type]
        self.rows: dict[str, StepRow] = {}
        self.samples: dict[str, list[float]] = {}
        self.others: list[StepRow] = list(section.values["rows"])

    def measure(self, makers: Mapping[str, Callable[[], Variant]], end: float) -> None:
        """end: the time by time.perf_counter() after which no round begins."""
        self.makers, self.end = makers, end
        self.last = time.perf_counter() + LAST_START * (end - time.perf_counter())
        self.group = 1 + max((r.group for r in self.others), default=-1)
        for ready in timing.interleaved(
            makers, self._start, self._sample, self._failed, self.rounds - 1, self.device
        ):
            self._count(ready)
            self.group += 1

    def _start(self, name: str) -> Variant:
        """Makes a variant and takes its first sample."""
        row = self.rows[name] = StepRow(variant=name, dtype=self.dtype, group=self.group)
        start = time.perf_counter()
        if start > self.last:
            raise UserError("the time for this benchmark was over")
        with peak_of(self.device, row):
            variant = self.makers[name]()
            variant.warm_up()
        row.first_seconds = time.perf_counter() - start
        self.samples[name] = []
        self._sample(name, variant)
        print(line(row), flush=True)
        return variant

    def _sample(self, name: str, variant: Variant) -> None:
        row, samples = self.rows[name], self.samples[name]
        if samples and time.perf_counter() > self.end:
            return
        samples.append(variant.seconds_a_step(self.steps))
        t, model = timing.Timing(samples, False), self.setting.model
        tokens = self.setting.recipe.batch_size * model.context
        peak = self.section.values["peak_rates"]["peak"][self.dtype]
        row.seconds, row.iqr, row.samples = t.median, t.iqr, len(samples)
        row.tokens_per_s = tokens / t.median
        row.mfu = row.tokens_per_s * model.flops_per_token() / peak
        self._put()

    def _count(self, ready: dict[str, Variant]) -> None:
        """Counts kernels and launches, last, because a profiler changes what runs after it."""
        for name, variant in ready.items():
            row = self.rows[name]
            try:
                if time.perf_counter() < self.end:
                    row.kernels, row.launches = variant.counts()
            except Exception as e:
                self._failed(name, e)
            print(line(row), flush=True)
        self._put()

    def _failed(self, name: str, e: Exception) -> None:
        """That it cannot run here is a result. One that fails later keeps its samples."""
        row = self.rows[name]
        if row.timed:
            row.stop_reason = timing.reason(e)
            print(f"{name}: {row.stop_reason}", flush=True)
        else:
            row.skipped_reason = timing.reason(e)
            print(line(row), flush=True)
        self._put()

    def _put(self) -> None:
        self.section.put(rows=[*self.others, *self.rows.values()])


def line(row: StepRow) -> str:
    """A row for a terminal."""
    memory = f"{row.peak_bytes / 2**30:6.2f} GiB" if row.peak_bytes else ""
    kernels = f"{row.kernels:5} kernels" if row.kernels else ""
    return row.line(f"{row.tokens_per_s:,.0f} tokens/s", f"MFU {row.mfu:.1%}", memory, kernels)
