"""The candidate launch options of kernels, and how they are ranked."""

from typing import Any

import pytest
from irongpt_kernels.aot import tiles
from irongpt_kernels.runtime import launch_table


@pytest.mark.parametrize("kernel", list(launch_table.OPTION_NAMES))
@pytest.mark.parametrize("arch", [75, 80, 90])
def test_every_kernel_has_candidates_that_a_table_takes(kernel: str, arch: int) -> None:
    size = 64 if kernel.startswith("attention") else 1536 if kernel.startswith("gelu") else 384
    found = tiles.launches((kernel, size, 2), arch)
    if kernel in launch_table.HEADS and arch < 80:  # does not fit
        assert found == []
        return
    assert 5 <= len(found) <= 80
    assert len({tuple(x.values()) for x in found}) == len(found)
    for options in found:
        assert launch_table.table_of([dict(kernel=kernel, size=size, itemsize=2, options=options)])


@pytest.mark.parametrize(
    ("kernel", "tile", "wanted", "masked"),
    [
        ("forward", (64, 64), 1 + 2 + 3 + 4, 4),
        ("forward", (128, 64), 2 + 4, 2 + 2),
        ("query", (64, 32), 2 + 4 + 6 + 8, 2 + 2 + 2 + 2),
        ("key", (32, 64), 8 + 6 + 4 + 2, 2 + 2 + 2 + 2),
        ("key", (64, 32), 4 + 4 + 3 + 3 + 2 + 2 + 1 + 1, 8),
    ],
)
def test_clocks_of_a_head(kernel: str, tile: tuple[int, int], wanted: int, masked: int) -> None:
    """Tiles of scores on and below the diagonal; bytes through L2 and DRAM by hand."""
    chosen = tiles.Tile(*tile, num_warps=4)
    assert tiles.visited_tiles(chosen, 256) == wanted
    assert tiles.masked_tiles(kernel, chosen, 256) == masked
    loops = [dict(alu=10.0), dict(alu=13.0)]  # as compiled: the key kernel's masked loop is first
    in_order = loops[::-1] if kernel == "key" else loops
    found = tiles.clocks_per_head(kernel, chosen, in_order, 80, 64, 2)
    assert found["alu"] == 10 * wanted + 3 * masked
    assert tiles.clocks_per_head(kernel, chosen, loops[:1], 80, 64, 2)["alu"] == 10 * wanted
    rows = {"forward": 4, "query": 6, "key": 6}[kernel] * 256 * 128  # bytes, each tensor once
    assert found["dram"] == pytest.approx(rows / tiles.DRAM[80])
    once = {"forward": 2, "query": 4, "key": 4}[kernel] * 256 * 128
    again = 2 * wanted * tile[0 if kernel == "key" else 1] * 128
    assert found["l2"] == pytest.approx((once + again) / tiles.L2[80])


def test_clocks_of_a_program_for_a_head() -> None:
    """128 keys with all rows, and 128 with half of them."""
    loops = [dict(alu=10.0), dict(alu=6.0)]
    found = tiles.clocks_per_head("head", tiles.Tile(256, 32, 8), loops, 90, 64, 2)
    assert found["alu"] == 4 * 10 + 4 * 6
    assert found["dram"] == pytest.approx(8 * 256 * 128 / tiles.DRAM[90])
    assert found["l2"] == pytest.approx(9 * 256 * 128 / tiles.L2[90])


def test_candidates_are_ranked_by_their_bottleneck() -> None:
    def row(stack: int = 0, warps: int = 8, **head: float) -> dict[str, Any]:
        kernel = tiles.KERNELS["forward"]
        return dict(kernel=kernel, stack=stack, warps_per_sm=warps, per_pair=0, head=head)

    best, second = row(alu=5, dram=9), row(alu=6, dram=9)
    few, spilled = row(warps=4, alu=1, dram=1), row(stack=8, alu=1, dram=1)
    found = sorted([spilled, few, second, best], key=tiles._order)
    assert found == [best, second, few, spilled]
