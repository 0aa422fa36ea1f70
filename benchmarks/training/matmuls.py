"""Times the matmuls of a training step, each shape alone, and Muon's iteration."""

from typing import Any

import torch

from benchmarks import roofline
from irongpt import timing
from irongpt.config import GPTConfig, TrainConfig
from irongpt.device import synchronize
from irongpt.training import muon


def measure(
    config: GPTConfig, train: TrainConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Times the matmuls of a step: forward y = x w, dx = dy w^T and dw = x^T dy, all in `dtype`.

    Operands stay in the caches if they fit, so in a step the same matmul may be slower. The matmuls
    of attention are missing, because no kernel computes them alone. If the optimizer is Muon,
    `optimizer` is its iteration, which a GPU runs as one graph.
    """
    rows, total, flops = [], 0.0, 0
    found: dict[str, Any] = {}
    with timing.stream(device):
        if train.optimizer == "muon":
            updates = roofline.muon_updates(config, muon.matmul_dtype(dtype, device), device)
            seconds = _seconds({"": lambda i: muon.orthogonal(updates)}, device)[""]
            found["optimizer"] = {"seconds": seconds, "flops": roofline.muon_flops(config)}
        for name, count, M, K, N in roofline.matmul_shapes(config, train.batch_size):
            x, w, dy = (
                torch.randn(size, device=device).to(dtype) for size in ((M, K), (K, N), (M, N))
            )
            calls: dict[str, timing.Call] = {
                "y": lambda i, x=x, w=w: x @ w,  # type: ignore[misc]
                "dx": lambda i, dy=dy, w=w: dy @ w.T,  # type: ignore[misc]
                "dw": lambda i, x=x, dy=dy: x.T @ dy,  # type: ignore[misc]
            }
            for result, seconds in _seconds(calls, device).items():
                one = 2 * M * K * N
                total += count * seconds
                flops += count * one
                row = {"name": f"{name} {result}", "count": count, "size": [M, K, N]}
                rows.append(row | {"seconds": seconds, "flops_per_s": one / seconds})
    synchronize(device)
    return found | {"seconds": total, "flops": flops, "rows": rows}


def _seconds(calls: dict[str, timing.Call], device: torch.device) -> dict[str, float]:
    """Median seconds by name."""
    found = {}
    rounds = 10 if device.type == "cuda" else 3
    for name, t in timing.measure(calls, 1, device, rounds).items():
        assert isinstance(t, timing.Timing), t
        found[name] = t.median
    return found


def of_step(found: dict[str, Any], variant: str = "") -> float:
    """Seconds of all matmuls in a step. The variants with nanoGPT's AdamW do not run Muon."""
    without = variant.startswith(("nanoGPT", "builtin AdamW"))
    iteration = 0.0 if without else found.get("optimizer", {}).get("seconds", 0.0)
    return float(found["seconds"] + iteration)


def line(dtype: str, found: dict[str, Any]) -> str:
    """The result for a terminal."""
    text = (
        f"{dtype:9} matmuls alone {found['seconds'] * 1e3:9.2f} ms, "
        f"{found['flops'] / found['seconds'] / 1e12:.3g} TFLOP/s"
    )
    if "optimizer" in found:
        text += f", Muon's iteration {found['optimizer']['seconds'] * 1e3:.2f} ms"
    bound = found["lower_bound_seconds"] * 1e3
    return f"{text}; computed lower bound of a step {bound:.2f} ms"
