"""A pytest plugin: the project's own tests with kernels executed from their PTX on the CPU.

    python -m pytest -p tests.ptx.plugin --ptx sm_75 tests/kernels/test_gelu.py

A test fails if its assertions fail, or if a launch accessed memory wrongly. For sm_80 and newer the
tests include bfloat16. Tests that need the interpreter or a GPU are skipped. The other options are
--ptx-order, --ptx-mma and --ptx-noise, see `python -m tests.ptx --help`.
"""

import os
from collections.abc import Generator
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before anything imports Triton

import pytest
from irongpt_kernels.ptx.driver import emulating

totals = dict(launches=0, instructions=0)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ptx")
    group.addoption("--ptx", default="sm_75", help="the architecture: sm_75, sm_80, sm_90")
    group.addoption("--ptx-order", default="lockstep")
    group.addoption("--ptx-mma", default="exact")
    group.addoption("--ptx-noise", type=float, default=0.0)


def pytest_configure(config: pytest.Config) -> None:
    import numerics
    import torch

    if config.option.ptx != "sm_75":
        for dtypes in (numerics.HALVES, numerics.DTYPES):
            dtypes.append(torch.bfloat16)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    option = item.config.option
    arch = int(option.ptx.removeprefix("sm_"))
    how = dict(order=option.ptx_order, mma=option.ptx_mma, noise=option.ptx_noise)
    with emulating(arch, **how) as report:
        result = yield
    totals["launches"] += report.launches
    totals["instructions"] += report.instructions
    assert not report.counts, "\n".join(report.lines())
    return result


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    launches, instructions = totals["launches"], totals["instructions"]
    terminalreporter.write_line(
        f"{config.option.ptx}: {launches:,} launches, {instructions:,} instructions of warps"
    )
