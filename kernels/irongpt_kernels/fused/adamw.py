"""
AdamW for all weights at once, with unscaling and clipping before it and the 16-bit copies after it.

    g = g / grad_scale                        grad_scale, found_inf: of `grad_norm`
    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    p = p - lr decay p                     t: the steps so far, with this one
    p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    copy = p, rounded to its type

Traffic     With gradients of 2 bytes: reads g, p, m, v and writes p, m, v and the copy, 28 bytes a
            weight; with `grad_norm` 30. Other passes for unscaling, clipping and casts cost 20
            more. A step that overflows reads its flag and leaves.
Parallelism As in `grad_norm`: one kernel for up to 48 weights. No program needs another's result.
Precision   float32. 1 - beta^t is -expm1(t log beta), with the logarithm taken in float64: for
            beta2 = 0.999 a difference would lose four digits at t = 1.
Limits      Contiguous weights, moments and copies, at addresses that are multiples of 16; the first
            two are float32. The copies are those of the first weights, and gradients are float32
            but for those, whose gradients may be of a 16-bit type.
Spec        irongpt_kernels/eager.py::adamw
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.fused.grad_norm import (
    BLOCK,
    address_of,
    chunks,
    layout,
    load,
    load_gradient,
    narrow_count,
    packed,
)
from irongpt_kernels.runtime import launch


@triton.jit
def _store(address, offsets, x, mask, dtype: tl.constexpr):
    pointer = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
    tl.store(pointer + offsets, x.to(dtype), mask=mask)


@triton.jit
def _correction(t, log_beta):
    """1 - beta^t, t > 0: near zero by the series of expm1, where a difference loses digits."""
    x = t * log_beta  # at most 0
    series = 1.0 + x / 10.0
    for i in tl.static_range(9, 1, -1):
        series = 1.0 + x / i * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _adamw_kernel(
    grads, weights, low_precision_params, exp_avgs, exp_avg_sqs, firsts, sizes, decays,
    steps_ptr, lr_ptr, unscaled_ptr, beta1, rest1, log1, beta2, rest2, log2, eps,
    N: tl.constexpr, NARROW: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of N tensors the first NARROW have narrow gradients, and the first COPIES have copies.

    rest1, log1: 1 - beta1 and log(beta1), and so for beta2. steps_ptr: that of the first tensor.
    """
    program = tl.program_id(0)
    first, size, decay = 0, tl.cast(sizes[0], tl.int64), tl.cast(decays[0], tl.float32)
    g_at, p_at = grads[0].to(tl.int64), weights[0].to(tl.int64)
    m_at, v_at = exp_avgs[0].to(tl.int64), exp_avg_sqs[0].to(tl.int64)
    index, narrow, copied = 0, NARROW > 0, COPIES > 0
    copy_at = p_at
    if COPIES > 0:
        copy_at = low_precision_params[0].to(tl.int64)
    for i in tl.static_range(1, N):
        mine = program >= firsts[i]
        g_at, p_at = address_of(grads, i, mine, g_at), address_of(weights, i, mine, p_at)
        m_at, v_at = address_of(exp_avgs, i, mine, m_at), address_of(exp_avg_sqs, i, mine, v_at)
        if i < COPIES:
            copy_at = address_of(low_precision_params, i, mine, copy_at)
        index = tl.where(mine, i, index)
        first, size = tl.where(mine, firsts[i], first), tl.where(mine, sizes[i], size)
        decay = tl.where(mine, decays[i], decay)
        narrow, copied = tl.where(mine, i < NARROW, narrow), tl.where(mine, i < COPIES, copied)
    if tl.load(unscaled_ptr + 2) == 0.0:
        grad_scale, lr, t = tl.load(unscaled_ptr + 1), tl.load(lr_ptr), tl.load(steps_ptr + index)
        offsets = tl.cast(program - first, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < size
        dtype: tl.constexpr = grads[0].dtype.element_ty
        g = load_gradient(g_at, offsets, mask, narrow, NARROW > 0, NARROW < N, dtype) / grad_scale
        m = beta1 * load(m_at, offsets, mask, tl.float32) + rest1 * g
        v = beta2 * load(v_at, offsets, mask, tl.float32) + rest2 * (g * g)
        p = load(p_at, offsets, mask, tl.float32)
        p -= lr * decay * p
        spread = tl.sqrt_rn(v) / tl.sqrt_rn(_correction(t, log2)) + eps
        p -= lr / _correction(t, log1) * m / spread
        _store(m_at, offsets, m, mask, tl.float32)
        _store(v_at, offsets, v, mask, tl.float32)
        _store(p_at, offsets, p, mask, tl.float32)
        if COPIES > 0:
            _store(copy_at, offsets, p, mask & copied, low_precision_params[0].dtype.element_ty)


def adamw_launch(
    params: list[Tensor],
    low_precision_params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: Tensor,
    lr: Tensor,
    stats: Tensor,
    beta1: float,
    beta2: float,
    weight_decays: list[float],
    eps: float,
) -> None:
    """See `eager.adamw`; params, copies and moments change in place."""
    grads = [packed(g) for g in grads]
    betas = (x for beta in (beta1, beta2) for x in (beta, 1 - beta, math.log(beta or 5e-324)))
    numbers = (*betas, eps)
    with launch.on(lr.device):
        for a, b, count in chunks(params):
            if not count:
                continue
            lists = (grads, params, low_precision_params, exp_avgs, exp_avg_sqs)
            options = dict(
                N=len(params[a:b]),
                NARROW=narrow_count(grads[a:b]),
                COPIES=len(low_precision_params[a:b]),
                BLOCK=BLOCK,
            )
            _adamw_kernel[(count,)](
                *(tuple(tensors[a:b]) for tensors in lists), *layout(params[a:b]),
                tuple(weight_decays[a:b]), state_steps[a:], lr, stats, *numbers,
                **options, num_warps=4,
            )  # fmt: skip


_op = torch.library.custom_op(
    "irongpt::adamw",
    adamw_launch,
    mutates_args=("params", "low_precision_params", "exp_avgs", "exp_avg_sqs"),
)


@_op.register_fake
def _(*_: Any) -> None:
    return None


def adamw(
    params: list[Tensor],
    low_precision_params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: Tensor,
    lr: Tensor,
    stats: Tensor,
    *,
    beta1: float,
    beta2: float,
    weight_decays: list[float],
    eps: float = 1e-8,
) -> None:
    """See `eager.adamw`, and Limits."""
    lists = (
        list(params),
        list(low_precision_params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
    )
    _op(*lists, state_steps, lr, stats, beta1, beta2, list(weight_decays), eps)
