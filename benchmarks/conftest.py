"""Options of `pytest benchmarks`, and the result file that its measurements go to."""

import math
import time
from collections.abc import Iterator

import pytest

from benchmarks.measure import result_file
from benchmarks.measure.rows import KernelRow
from benchmarks.ops import __main__ as kernels
from benchmarks.ops.cases import SWEEPS, Case, cases_of
from benchmarks.ops.providers import NAMES, computes, missing
from irongpt import device as devices
from irongpt.errors import UserError


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("irongpt")
    group.addoption("--no-sweeps", action="store_true", help="time only the model's shape")
    help = "minutes after which no further case begins [no limit]"
    group.addoption("--minutes", type=float, default=math.inf, help=help)
    help = f"time only these implementations, separated by commas: {', '.join(NAMES)} [all]"
    group.addoption("--providers", metavar="NAMES", default=",".join(NAMES), help=help)
    result_file.add_options(group.addoption)


class Session:
    """Measures a case when the first of its rows is asked for, all providers interleaved."""

    def __init__(self, config: pytest.Config) -> None:
        self.device = devices.pick(config.getoption("device"))
        self.names = tuple(config.getoption("providers").split(","))
        self.section = result_file.Section("kernels", self.device, config.option)
        self.end = time.perf_counter() + 60 * config.getoption("minutes")
        self.case: Case | None = None
        self.rows: list[KernelRow] = []

    def row(self, case: Case, mode: str, provider: str) -> KernelRow:
        """The row of a provider, with a `skipped_reason` if it was not timed."""
        if case != self.case:
            if time.perf_counter() > self.end:
                pytest.skip("the --minutes are over: the rows so far are saved")
            self.case, self.rows = case, kernels.measure_case(case, self.device, self.names)
            self.section.put(rows=self.section.values["rows"] + self.rows)
        return next(
            row
            for row in self.rows
            if row.provider == provider and (row.skipped_reason or row.mode == mode)
        )


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    made = Session(request.config)
    with kernels.begun(made.section, made.names):
        yield made
        print()  # ends the line of pytest's dots


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    try:
        device = devices.pick(config.getoption("device"))
    except UserError as e:
        pytest.exit(str(e), returncode=2)
    cases = cases_of(device, swept=() if config.getoption("no_sweeps") else SWEEPS)
    names = config.getoption("providers").split(",")
    without = missing(device, tuple(names))
    here = [name for name in names if name not in without]
    wanted = [
        (c, mode, name) for c in cases for mode in c.modes for name in here if computes(name, c.op)
    ]
    ids = [f"{c.sweep}-{c.name}-{mode}-{name}".replace(" ", "_") for c, mode, name in wanted]
    metafunc.parametrize(("case", "mode", "provider"), wanted, ids=ids)
