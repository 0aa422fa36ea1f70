"""The cases of `ops` in the code that Triton compiles for sm_75, executed on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from irongpt_kernels.ptx.driver import emulating

from tests.campaign.ops import Case


@contextmanager
def campaign(folder: Path) -> Iterator[Case]:
    torch.set_num_threads(1)
    yield Case(partial(emulating, 75))
