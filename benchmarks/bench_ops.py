"""Every op by every provider as benchmarks of pytest-benchmark: `make bench`.

The samples are those of `benchmarks.ops.__main__.measure_case`: CUDA events, providers interleaved.
pytest-benchmark times a function with a clock. Here each sample advances that clock, so that the
tables, comparisons and JSON of pytest-benchmark have the time of the device and not that of Python.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import roofline
from benchmarks.conftest import Session
from benchmarks.ops.accuracy import passes
from benchmarks.ops.cases import Case
from benchmarks.report.tables_kernels import mark


class Clock:
    """A clock for samples that were measured before; `tick` advances it by the next one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: list[float] = []

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += self.samples.pop(0)


CLOCK = Clock()


@pytest.mark.benchmark(timer=CLOCK, disable_gc=False)
def bench_op(
    benchmark: BenchmarkFixture, session: Session, case: Case, mode: str, provider: str
) -> None:
    row = session.row(case, mode, provider)
    rates = roofline.derive(row, session.section.values["peak_rates"])
    if rates is None:
        assert row.accuracy is None or passes(provider, row.accuracy), row.skipped_reason
        pytest.skip(row.skipped_reason or "")
    benchmark.group = f"{case.name}, {mode}"
    benchmark.name = provider + mark(row)
    benchmark.extra_info.update(row.to_json() | rates._asdict())
    CLOCK.samples = list(row.sample_seconds)
    benchmark.pedantic(CLOCK.tick, rounds=len(CLOCK.samples), iterations=1)
