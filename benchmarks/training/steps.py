"""Times interleaved training steps of several variants, and writes a row for each."""

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.measure import result_file
from benchmarks.measure.rows import StepRow
from benchmarks.presets import Setting
from benchmarks.training.variants import Variant, peak_of
from irongpt import timing
from irongpt.timing import free, reason

STEPS = {"cuda": 10, "cpu": 2}  # steps of a variant per round
ROUNDS = {"cuda": 8, "cpu": 4}
LAST_START = 0.7  # share of the time after which no further variant starts

Make = Callable[[Setting], Variant]


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

    def measure(self, waiting: list[tuple[str, Make]], end: float) -> None:
        """end: the time by time.perf_counter() after which no round begins."""
        last = time.perf_counter() + LAST_START * (end - time.perf_counter())
        group = 1 + max((r.group for r in self.section.values["rows"]), default=-1)
        while waiting:
            ready, waiting = self._begin(waiting, last, group)
            for i in range(1, self.rounds):
                names = list(ready)
                first = i % max(1, len(names))
                for name in names[first:] + names[:first]:
                    if time.perf_counter() < end:
                        self._attempt(name, ready, self._sample)
            for name in list(ready):  # last, because a profiler changes what runs after it
                if time.perf_counter() < end:
                    self._attempt(name, ready, self._count)
                print(line(self.rows[name]), flush=True)
            ready.clear()
            free(self.device)
            group += 1
        self.section.put()

    def _begin(
        self, waiting: list[tuple[str, Make]], last: float, group: int
    ) -> tuple[dict[str, Variant], list[tuple[str, Make]]]:
        """The variants that fit in memory, each with a first sample, and those that must wait."""
        ready: dict[str, Variant] = {}
        for i, (name, make) in enumerate(waiting):
            row, full = StepRow(variant=name, dtype=self.dtype, group=group), False
            self.rows[name] = row
            self.section.values["rows"].append(row)
            if time.perf_counter() > last:
                row.skipped_reason = "the time for this benchmark was over"
                continue
            start = time.perf_counter()
            try:
                with peak_of(self.device, row):
                    ready[name] = make(self.setting)
                    ready[name].warm_up()
                row.first_seconds = time.perf_counter() - start
                self.samples[name] = []
                self._sample(name, ready[name])
            except Exception as e:  # that it cannot run here is a result
                full = isinstance(e, torch.cuda.OutOfMemoryError)
                row.skipped_reason = reason(e)
                ready.pop(name, None)
                free(self.device)
            if full and ready:
                return ready, waiting[i:]
            print(line(row), flush=True)
        return ready, []

    def _attempt(
        self, name: str, ready: dict[str, Variant], do: Callable[[str, Variant], None]
    ) -> None:
        """A variant that fails keeps the samples that it already has."""
        try:
            do(name, ready[name])
        except Exception as e:
            self.rows[name].stop_reason = reason(e)
            del ready[name]
            free(self.device)
            print(f"{name}: {reason(e)}", flush=True)
            self.section.put()

    def _sample(self, name: str, variant: Variant) -> None:
        self.samples[name].append(variant.seconds_a_step(self.steps))
        t, row = timing.Timing(self.samples[name], False), self.rows[name]
        model = self.setting.model
        tokens = self.setting.recipe.batch_size * model.context
        peak = self.section.values["peak_rates"]["peak"][self.dtype]
        row.seconds, row.iqr, row.samples = t.median, t.iqr, len(t.samples)
        row.tokens_per_s = tokens / t.median
        row.mfu = row.tokens_per_s * model.flops_per_token() / peak
        self.section.put()

    def _count(self, name: str, variant: Variant) -> None:
        self.rows[name].kernels, self.rows[name].launches = variant.counts()
        self.section.put()


def line(row: StepRow) -> str:
    """A row for a terminal."""
    memory = f"{row.peak_bytes / 2**30:6.2f} GiB" if row.peak_bytes else ""
    kernels = f"{row.kernels:5} kernels" if row.kernels else ""
    return row.line(f"{row.tokens_per_s:,.0f} tokens/s", f"MFU {row.mfu:.1%}", memory, kernels)
