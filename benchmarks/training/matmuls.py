"""The matrix products of a training step, each timed alone, and the floor that they stand on."""

from typing import Any

import torch
from irongpt_kernels import op_specs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ops.cases import Case, Shape
from irongpt import timing
from irongpt.config import GPTConfig, TrainConfig
from irongpt.device import dtype_name, synchronize
from irongpt.training import muon


def shapes(config: GPTConfig, batch_size: int) -> list[tuple[str, int, int, int, int]]:
    """(name, how often in a step, M, K, N) of y (M, N) = x (M, K) w (K, N), in the forward."""
    M = batch_size * config.context
    names = ("qkv", "projection", "fc", "fc projection")
    blocks = [
        (name, config.n_layer, M, columns, rows)
        for name, (rows, columns) in zip(names, config.matrices(), strict=True)
    ]
    return [*blocks, ("head", 1, M, config.n_embd, config.vocab_size)]


def momenta(config: GPTConfig, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """What Muon makes orthogonal in a step: (L, rows, columns), each matrix of norm 1."""
    found = []
    for size in config.matrices():
        x = torch.randn(config.n_layer, *size, device=device)
        found.append((x / x.norm(dim=(1, 2), keepdim=True)).to(dtype))
    return found


def muon_flops(config: GPTConfig) -> int:
    """Of the products of Muon's iteration in a step, as PyTorch's counter has them."""
    with FlopCounterMode(display=False) as counter:
        muon.orthogonal(momenta(config, torch.float32, "meta"))
    return int(counter.get_total_flops())


def measure(
    config: GPTConfig, train: TrainConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Seconds of a step's products: forward y = x w, dx = dy w^T, dw = x^T dy, `dtype` throughout.

    Operands stay in the caches as far as they fit: in a step they may be colder, never warmer.
    Attention's products are not among them: no kernel computes them apart. With Muon, `optimizer`
    has its iteration, whose matrices are fixed: a GPU runs it as one graph.
    """
    rows, total, flops = [], 0.0, 0
    found: dict[str, Any] = {}
    with timing.stream(device):
        if train.optimizer == "muon":
            ahead = momenta(config, muon.matmul_dtype(dtype, device), device)
            taken = _seconds({"": lambda i: muon.orthogonal(ahead)}, device)[""]
            found["optimizer"] = {"seconds": taken, "flops": muon_flops(config)}
        for name, count, M, K, N in shapes(config, train.batch_size):
            x, w, dy = (
                torch.randn(size, device=device).to(dtype) for size in ((M, K), (K, N), (M, N))
            )
            calls: dict[str, timing.Call] = {
                "y": lambda i, x=x, w=w: x @ w,  # type: ignore[misc]
                "dx": lambda i, dy=dy, w=w: dy @ w.T,  # type: ignore[misc]
                "dw": lambda i, x=x, dy=dy: x.T @ dy,  # type: ignore[misc]
            }
            for which, taken in _seconds(calls, device).items():
                total += count * taken
                flops += count * 2 * M * K * N
                rows.append(
                    {
                        "name": f"{name} {which}",
                        "count": count,
                        "size": [M, K, N],
                        "seconds": taken,
                        "flops_per_s": 2 * M * K * N / taken,
                    }
                )
    synchronize(device)
    return found | {"seconds": total, "flops": flops, "rows": rows}


def _seconds(calls: dict[str, timing.Call], device: torch.device) -> dict[str, float]:
    """Medians, by name."""
    found = {}
    rounds = 10 if device.type == "cuda" else 3
    for name, t in timing.measure(calls, 1, device, rounds).items():
        assert isinstance(t, timing.Timing), t
        found[name] = t.median
    return found


def optimizer_bytes(config: GPTConfig, optimizer: str, itemsize: int) -> int:
    """Least bytes of an optimizer's step, the products of Muon's iteration apart: by the kernels'
    cost functions.

    Gradients of the blocks' matrices have `itemsize` bytes, and so have the copies that are written
    where that is not 4; all else is float32.
    """
    n = config.n_layer * sum(r * c for r, c in config.matrices())
    return op_specs.optimizer_bytes(optimizer, n, config.n_params() - n, itemsize)


def least_bytes(config: GPTConfig, train: TrainConfig, dtype: torch.dtype) -> dict[str, int]:
    """Least bytes of all but the matmuls in a step, by op.

    By the kernels' cost functions; the embedding by counting.
    """
    H, C, L, T = config.n_head, config.n_embd, config.n_layer, config.context
    shape = Shape(train.batch_size, H, T, C // H, config.vocab_size)
    counts = {
        "causal_attention_packed": L,
        "dropout_add_layer_norm": 2 * L,
        "gelu": L,
        "cross_entropy": 1,
        "layer_norm": 1,
    }
    found = {}
    for op, count in counts.items():
        found[op] = count * Case(op, "", shape, dtype, config.dropout).cost("total")[0]
    found["embedding"] = 2 * 2 * train.batch_size * T * C * 4  # written and its gradient, float32
    found["optimizer"] = optimizer_bytes(config, train.optimizer, dtype.itemsize)
    return found


def floor(
    config: GPTConfig,
    train: TrainConfig,
    dtype: torch.dtype,
    products_seconds: float,
    peak_rates: dict[str, Any],
) -> dict[str, Any]:
    """Computed: the products' time and the least bytes of the rest at the copy's bandwidth."""
    moved = least_bytes(config, train, dtype)
    rest = sum(moved.values()) / peak_rates["copy_bytes_per_s"]
    return {"least_bytes": moved, "lower_bound_seconds": products_seconds + rest}


def bound(
    config: GPTConfig, train: TrainConfig, dtype: torch.dtype, peak_rates: dict[str, Any]
) -> float | None:
    """Computes the seconds of a step from the peak rates of a device. None without Triton."""
    work = sum(3 * count * 2 * M * K * N for _, count, M, K, N in shapes(config, train.batch_size))
    work += muon_flops(config) if train.optimizer == "muon" else 0
    products = work / peak_rates["gemm_flops_per_s"][dtype_name(dtype)]
    found = floor(config, train, dtype, products, peak_rates)
    return found.get("lower_bound_seconds")


def of_step(found: dict[str, Any], variant: str = "") -> float:
    """Seconds of all products in a step; those that are compared with nanoGPT have no Muon."""
    without = variant.startswith(("nanoGPT", "builtin AdamW"))
    own = 0.0 if without else found.get("optimizer", {}).get("seconds", 0.0)
    return float(found["seconds"] + own)


def line(dtype: str, found: dict[str, Any]) -> str:
    text = (
        f"{dtype:9} matrix products alone {found['seconds'] * 1e3:9.2f} ms, "
        f"{found['flops'] / found['seconds'] / 1e12:.3g} TFLOP/s"
    )
    if "optimizer" in found:
        text += f", Muon's iteration {found['optimizer']['seconds'] * 1e3:.2f} ms"
    if "lower_bound_seconds" in found:
        text += f"; computed lower bound of a step {found['lower_bound_seconds'] * 1e3:.2f} ms"
    return text
