"""Makes torch report a GPU on a machine without one."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from irongpt_kernels.runtime import emulate, launch_table

from irongpt import launch_cache


def fake_gpu(
    patch: pytest.MonkeyPatch,
    name: str = "Tesla T4",
    capability: tuple[int, int] = (7, 5),
    count: int = 1,
) -> SimpleNamespace:
    """Makes torch report GPUs of this kind. Returns their properties, which a test may change."""
    card = SimpleNamespace(name=name, major=capability[0], minor=capability[1], uuid="ab-cd")
    card.total_memory, card.multi_processor_count, card.L2_cache_size = 15 << 30, 40, 50 << 20
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_device_properties": lambda device: card,
        "get_device_capability": lambda device: (card.major, card.minor),
        "get_device_name": lambda device: card.name,
    }
    for function, fake in fakes.items():
        patch.setattr(torch.cuda, function, fake)
    patch.setattr("irongpt.ops._build_launcher", lambda hint: None)
    patch.delenv(emulate.VARIABLE, raising=False)
    return card


@pytest.fixture(autouse=True)
def reset_launch_tables() -> Iterator[None]:
    """In a module that imports it, no launch table outlives a test."""
    launch_cache.load.cache_clear()
    yield
    launch_cache.load.cache_clear()
    launch_table._tables.clear()
