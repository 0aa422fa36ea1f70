"""The roofline model: the least time of an op and of a training step, from bytes, FLOPs and rates.

    an op              max(bytes / copy bandwidth, FLOPs / matmul rate)
    a training step    seconds of its matmuls + bytes of all other ops / copy bandwidth

Bytes and FLOPs are the least that an op needs (`irongpt_kernels.op_specs`); rates are those of a
large copy and a large matmul on a device. All results here are computed, not measured.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from irongpt_kernels import op_costs, op_specs
from irongpt_kernels.op_inputs import Shape
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure.rows import KernelRow
from benchmarks.presets import model_of
from irongpt.config import PRESETS, GPTConfig, TrainConfig
from irongpt.device import dtype_name
from irongpt.training import muon

PeakRates = dict[str, Any]  # copy_bytes_per_s, and gemm_flops_per_s by the name of a dtype

# What others have measured on a T4: copies reach 72 to 82 % of 320 GB/s, and cuBLAS reaches 18 to
# 24 TFLOP/s in float16 under the card's limit of 70 W.
T4: PeakRates = dict(copy_bytes_per_s=250e9, gemm_flops_per_s=dict(float16=24e12, float32=7e12))

# The bandwidth between two T4 over PCIe 3, through the host's memory. No measurement is published,
# so these are the slowest and the fastest guess.
T4_EXCHANGE = (3e9, 6e9)  # bytes per second


class Rates(NamedTuple):
    """What follows from the time of an op. share_of_gemm: None if its dtype has no peak rate.

    share_of_peak: the lower bound of the time over the time.
    """

    bytes_per_s: float
    flops_per_s: float
    share_of_copy: float
    share_of_gemm: float | None
    lower_bound_seconds: float
    share_of_peak: float


def op_seconds(row: KernelRow, dtype: str, rates: PeakRates) -> float:
    """Lower bound of an op's time."""
    rate = rates["gemm_flops_per_s"].get(dtype)
    by_flops = row.least_flops / rate if rate else 0.0
    return float(max(row.least_bytes / rates["copy_bytes_per_s"], by_flops))


def derive(row: KernelRow, rates: PeakRates) -> Rates:
    """The rates of a row that has a time."""
    rate = rates["gemm_flops_per_s"].get(row.dtype)
    bytes_per_s, flops_per_s = row.least_bytes / row.seconds, row.least_flops / row.seconds
    least = op_seconds(row, row.dtype, rates)
    return Rates(
        bytes_per_s=bytes_per_s,
        flops_per_s=flops_per_s,
        share_of_copy=bytes_per_s / rates["copy_bytes_per_s"],
        share_of_gemm=flops_per_s / rate if rate else None,
        lower_bound_seconds=least,
        share_of_peak=least / row.seconds,
    )


def matmul_shapes(config: GPTConfig, batch_size: int) -> list[tuple[str, int, int, int, int]]:
    """(name, count per step, M, K, N) of each forward matmul y (M, N) = x (M, K) w (K, N)."""
    M = batch_size * config.context
    names = ("qkv", "projection", "fc", "fc projection")
    blocks = [
        (name, config.n_layer, M, columns, rows)
        for name, (rows, columns) in zip(names, config.matrices(), strict=True)
    ]
    return [*blocks, ("head", 1, M, config.n_embd, config.vocab_size)]


def muon_updates(config: GPTConfig, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """Random inputs of Muon's iteration in a step: (L, rows, columns), each matrix of norm 1."""
    updates = []
    for size in config.matrices():
        x = torch.randn(config.n_layer, *size, device=device)
        updates.append((x / x.norm(dim=(1, 2), keepdim=True)).to(dtype))
    return updates


def muon_flops(config: GPTConfig) -> int:
    """FLOPs of Muon's iteration in a step, as PyTorch's counter counts its matmuls."""
    with FlopCounterMode(display=False) as counter:
        muon.orthogonal(muon_updates(config, torch.float32, "meta"))
    return int(counter.get_total_flops())


def optimizer_bytes(config: GPTConfig, optimizer: str, itemsize: int) -> int:
    """Least bytes of an optimizer's step, without the matmuls of Muon's iteration."""
    n = config.n_layer * sum(rows * columns for rows, columns in config.matrices())
    return op_costs.optimizer_bytes(optimizer, n, config.n_params() - n, itemsize)


def op_bytes(op: str, config: GPTConfig, batch_size: int, itemsize: int) -> int:
    """Least bytes of an op's forward and backward at the model's shape."""
    H = config.n_head
    shape = Shape(batch_size, H, config.context, config.n_embd // H, config.vocab_size)
    cost = op_specs.SPECS[op].cost
    return sum(cost(shape, itemsize, 4, backward).bytes for backward in (False, True))


def step_bytes(config: GPTConfig, train: TrainConfig, itemsize: int) -> dict[str, int]:
    """Least bytes of all ops of a step but the matmuls, by op."""
    L, B = config.n_layer, train.batch_size
    counts = dict(causal_attention_packed=L, dropout_add_layer_norm=2 * L, gelu=L)
    counts |= dict(embed_layer_norm=1)
    moved = {op: count * op_bytes(op, config, B, itemsize) for op, count in counts.items()}
    # The first norm, which the op's cost has in float32, is in the dtype of the matmuls.
    C = config.n_embd
    moved["embed_layer_norm"] -= 2 * (4 - itemsize) * B * config.context * C
    # The logits are read, and their gradient is written over them; a target is read.
    moved["cross_entropy"] = B * config.context * (2 * config.vocab_size * itemsize + 8)
    moved["optimizer"] = optimizer_bytes(config, train.optimizer, itemsize)
    return moved


def step_lower_bound(
    config: GPTConfig,
    train: TrainConfig,
    dtype: torch.dtype,
    rates: PeakRates,
    matmul_seconds: float | None = None,
) -> float:
    """Lower bound of a step's time. matmul_seconds: measured, or else FLOPs over the peak rate."""
    if matmul_seconds is None:
        shapes = matmul_shapes(config, train.batch_size)
        flops = sum(3 * count * 2 * M * K * N for _, count, M, K, N in shapes)
        flops += muon_flops(config) if train.optimizer == "muon" else 0
        matmul_seconds = flops / rates["gemm_flops_per_s"][dtype_name(dtype)]
    moved = sum(step_bytes(config, train, dtype.itemsize).values())
    return float(matmul_seconds + moved / rates["copy_bytes_per_s"])


def t4_step(preset: str = "iron") -> float:
    """Lower bound of a preset's step in float16 on a T4, in seconds."""
    recipe = TrainConfig(**PRESETS[preset].train)
    return step_lower_bound(model_of(preset), recipe, torch.float16, T4)


def two_t4_step(preset: str = "iron") -> tuple[float, float]:
    """The same on two T4, each with half of the sequences: the least and the most seconds.

    The exchange comes after the backward pass and overlaps with nothing. Besides, each T4 copies
    its gradients to a buffer, and writes and reads their sum, which is float32.
    """
    model, recipe = model_of(preset), TrainConfig(**PRESETS[preset].train)
    half = replace(recipe, batch_size=recipe.batch_size // 2)
    gradients = 2 * model.n_params()  # bytes, in float16
    least = step_lower_bound(model, half, torch.float16, T4)
    least += (2 + 4) * gradients / T4["copy_bytes_per_s"]
    slow, fast = (gradients / rate for rate in T4_EXCHANGE)
    return least + fast, least + slow
