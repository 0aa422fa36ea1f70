"""The matrix products of a training step, each timed alone, and the floor that they stand on."""

from typing import Any

import torch

from benchmarks import timing
from irongpt.config import GPTConfig

ADAMW_BYTES = 28  # a parameter: weight and two moments read and written, gradient read, float32


def shapes(config: GPTConfig, batch_size: int) -> list[tuple[str, int, int, int, int]]:
    """(name, how often in a step, M, K, N) of y (M, N) = x (M, K) w (K, N), in the forward."""
    M, C, L = batch_size * config.context, config.n_embd, config.n_layer
    return [
        ("qkv", L, M, C, 3 * C),
        ("projection", L, M, C, C),
        ("fc", L, M, C, 4 * C),
        ("fc projection", L, M, 4 * C, C),
        ("head", 1, M, C, config.vocab_size),
    ]


def measure(
    config: GPTConfig, batch_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Seconds of a step's products: forward y = x w, dx = dy w^T, dw = x^T dy, `dtype` throughout.

    Operands stay in the caches as far as they fit: in a step they may be colder, never warmer.
    Attention's products are not among them: no kernel computes them apart.
    """
    rows, total, flops = [], 0.0, 0
    with timing.stream(device):
        for name, count, M, K, N in shapes(config, batch_size):
            x, w, dy = (
                torch.randn(size, device=device).to(dtype) for size in ((M, K), (K, N), (M, N))
            )
            calls: dict[str, timing.Call] = {
                "y": lambda i, x=x, w=w: x @ w,  # type: ignore[misc]
                "dx": lambda i, dy=dy, w=w: dy @ w.T,  # type: ignore[misc]
                "dw": lambda i, x=x, dy=dy: x.T @ dy,  # type: ignore[misc]
            }
            rounds = 10 if device.type == "cuda" else 3
            for which, found in timing.measure(calls, 1, device, rounds).items():
                assert isinstance(found, timing.Timing), found
                total += count * found.median
                flops += count * 2 * M * K * N
                rows.append(
                    {
                        "name": f"{name} {which}",
                        "count": count,
                        "size": [M, K, N],
                        "seconds": found.median,
                        "flops_per_s": 2 * M * K * N / found.median,
                    }
                )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"seconds": total, "flops": flops, "rows": rows}


def least_bytes(config: GPTConfig, batch_size: int, dtype: torch.dtype) -> dict[str, int] | None:
    """Least bytes of all but the products in a step, by op; None without Triton.

    By the kernels' cost functions; embedding and optimizer by counting.
    """
    from benchmarks.workloads import Case, Shape

    H, C, L, T = config.n_head, config.n_embd, config.n_layer, config.context
    shape = Shape(batch_size, H, T, C // H, config.vocab_size)
    counts = {
        "causal_attention_packed": L,
        "dropout_add_layer_norm": 2 * L,
        "gelu": L,
        "cross_entropy": 1,
        "layer_norm": 1,
    }
    found = {}
    for op, count in counts.items():
        cost = Case(op, "", shape, dtype, config.dropout).cost("both")
        if cost is None:
            return None
        found[op] = count * cost[0]
    found["embedding"] = 2 * 2 * batch_size * T * C * 4  # written and its gradient, float32
    found["AdamW"] = ADAMW_BYTES * config.n_params()
    return found


def floor(
    config: GPTConfig,
    batch_size: int,
    dtype: torch.dtype,
    products_seconds: float,
    roofs: dict[str, Any],
) -> dict[str, Any]:
    """Computed: the products' time and the least bytes of the rest at the copy's bandwidth."""
    moved = least_bytes(config, batch_size, dtype)
    if moved is None:
        return {}
    rest = sum(moved.values()) / roofs["copy_bytes_per_s"]
    return {"least_bytes": moved, "computed_floor_seconds": products_seconds + rest}


def bound(config: GPTConfig, batch_size: int, dtype: torch.dtype, roofs: dict[str, Any]) -> float:
    """Computed seconds of a step on a device of which no more is known than its roofs."""
    work = sum(3 * count * 2 * M * K * N for _, count, M, K, N in shapes(config, batch_size))
    products = work / roofs["gemm_flops_per_s"][str(dtype)[6:]]
    found = floor(config, batch_size, dtype, products, roofs)
    return float(found.get("computed_floor_seconds", products))


def line(dtype: str, found: dict[str, Any]) -> str:
    text = (
        f"{dtype:9} matrix products alone {found['seconds'] * 1e3:9.2f} ms, "
        f"{found['flops'] / found['seconds'] / 1e12:.3g} TFLOP/s"
    )
    if "computed_floor_seconds" in found:
        text += f"; computed floor of a step {found['computed_floor_seconds'] * 1e3:.2f} ms"
    return text
