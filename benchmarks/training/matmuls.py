"""Times the matmuls of a training step, each shape alone, and Muon's iteration."""

import math
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.measure.environment import median_seconds
from benchmarks.presets import Setting
from irongpt.training import muon


def measure(
    setting: Setting, dtype: torch.dtype, device: torch.device, peak_rates: roofline.PeakRates
) -> dict[str, Any]:
    """Times the matmuls of a step: forward y = x w, dx = dy w^T and dw = x^T dy, all in `dtype`;
    and computes the lower bound of the step.

    Operands stay in the caches if they fit, so in a step the same matmul may be slower. The matmuls
    of attention are missing, because no kernel computes them alone. If the optimizer is Muon,
    `optimizer` is its iteration, which a GPU runs as one graph.
    """
    config, train, _ = setting
    rounds = 10 if device.type == "cuda" else 3
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"rows": rows}
    if train.optimizer == "muon":
        updates = roofline.muon_updates(config, muon.matmul_dtype(dtype, device), device)
        seconds = median_seconds(lambda i: muon.orthogonal(updates), device, rounds)
        result["optimizer"] = {"seconds": seconds, "flops": roofline.muon_flops(config)}
    for layer, count, M, K, N in roofline.matmul_shapes(config, train.batch_size):
        x, w, dy = (torch.randn(s, device=device).to(dtype) for s in ((M, K), (K, N), (M, N)))
        for name, a, b in (("y", x, w), ("dx", dy, w.T), ("dw", x.T, dy)):
            seconds = median_seconds(lambda i, a=a, b=b: a @ b, device, rounds)  # type: ignore[misc]
            row = {"name": f"{layer} {name}", "count": count, "size": [M, K, N]}
            rows.append(row | {"seconds": seconds, "flops_per_s": 2 * M * K * N / seconds})
    result["seconds"] = sum(r["count"] * r["seconds"] for r in rows)
    result["flops"] = sum(2 * r["count"] * math.prod(r["size"]) for r in rows)
    result["least_bytes"] = roofline.step_bytes(config, train, dtype.itemsize)
    result["lower_bound_seconds"] = roofline.step_lower_bound(
        config, train, dtype, peak_rates, of_step(result)
    )
    return result


def of_step(times: dict[str, Any], variant: str = "") -> float:
    """Seconds of all matmuls in a step. The variants with nanoGPT's AdamW do not run Muon."""
    without = variant.startswith(("nanoGPT", "builtin AdamW"))
    iteration = 0.0 if without else times.get("optimizer", {}).get("seconds", 0.0)
    return float(times["seconds"] + iteration)


def line(dtype: str, times: dict[str, Any]) -> str:
    """The result for a terminal."""
    text = (
        f"{dtype:9} matmuls alone {times['seconds'] * 1e3:9.2f} ms, "
        f"{times['flops'] / times['seconds'] / 1e12:.3g} TFLOP/s"
    )
    if "optimizer" in times:
        text += f", Muon's iteration {times['optimizer']['seconds'] * 1e3:.2f} ms"
    bound = times["lower_bound_seconds"] * 1e3
    return f"{text}; computed lower bound of a step {bound:.2f} ms"
