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
    """A clock that advances by the time of a sample that was measured before."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


@pytest.mark.benchmark(timer=CLOCK, disable_gc=False)
def bench_op(
    benchmark: BenchmarkFixture, session: Session, case: Case, mode: str, provider: str
) -> None:
    row = session.row(case, mode, provider)
    if not row.timed:
        assert row.accuracy is None or passes(provider, row.accuracy), row.skipped_reason
        pytest.skip(row.skipped_reason or "")
    benchmark.group = f"{case.name}, {mode}"
    benchmark.name = provider + mark(row)
    rates = roofline.derive(row, session.section.values["peak_rates"])
    benchmark.extra_info.update(row.to_json() | rates._asdict())
    samples = iter(row.sample_seconds)
    rounds = len(row.sample_seconds)
    benchmark.pedantic(lambda: CLOCK.advance(next(samples)), rounds=rounds, iterations=1)
