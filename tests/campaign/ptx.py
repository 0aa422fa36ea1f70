"""The cases of `ops` in the code that Triton compiles for sm_75, executed on the CPU."""

from contextlib import AbstractContextManager
from typing import Any

from irongpt_kernels.ptx.driver import emulating

from tests.campaign import ops


class Case(ops.Case):
    def place(self) -> AbstractContextManager[Any]:
        return emulating(75)
