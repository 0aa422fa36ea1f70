"""The planted bugs of `mutants` fit the kernels as they are. Running them takes half an hour."""

from pathlib import Path

import irongpt_kernels
import pytest
from mutants.bugs import BUGS

FOLDER = Path(irongpt_kernels.__file__).parent


@pytest.mark.parametrize("module", BUGS)
def test_every_bug_can_be_planted(module: str) -> None:
    text = (FOLDER / "fused" / f"{module}.py").read_text()
    stale = [name for name, old, new in BUGS[module][0] if text.count(old) != 1 or old == new]
    assert stale == []


def test_there_are_more_than_thirty() -> None:
    assert sum(len(bugs) for bugs, _, _ in BUGS.values()) >= 30
