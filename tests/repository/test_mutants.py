"""The bugs of the mutation tests fit the kernels as they are. Running them takes half an hour."""

from pathlib import Path

import irongpt_kernels
from mutants.bugs import BUGS

FUSED = Path(irongpt_kernels.__file__).parent / "fused"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "testing.md"


def test_every_bug_can_be_injected() -> None:
    stale = {
        module: [name for name, old, new in bugs if text.count(old) != 1 or old == new]
        for module, (bugs, _, _) in BUGS.items()
        for text in [(FUSED / f"{module}.py").read_text()]
    }
    assert {module: names for module, names in stale.items() if names} == {}


def test_the_page_has_their_number() -> None:
    assert f"{sum(len(bugs) for bugs, _, _ in BUGS.values())} bugs" in PAGE.read_text()
