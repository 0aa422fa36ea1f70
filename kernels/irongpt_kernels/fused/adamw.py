"""AdamW for all parameters in one kernel, with gradient unscaling, clipping and 16-bit copies.

    g = g / grad_scale                     grad_scale and found_inf come from `grad_norm`
    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    p = p - lr decay p
    p = p - (lr / (1 - beta1^t)) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    copy = p, rounded to the dtype of the copy

t is the number of steps, including this one.

Traffic     reads g, p, m, v and writes p, m, v and the copy: with 16-bit gradients 28 bytes per
            weight, and 30 together with `grad_norm`. Separate passes for unscaling, clipping and
            casts would move 20 bytes more. If found_inf is set, a program reads only that flag.
Parallelism as in `grad_norm`: one launch for up to 48 parameters. Programs are independent.
Precision   float32. 1 - beta^t is -expm1(t log beta), with the logarithm taken in float64: for
            beta2 = 0.999 the subtraction would lose two to three digits at t = 1.
Limits      Parameters and moments are contiguous float32, copies are contiguous and of one dtype,
            and all addresses are multiples of 16. If there are fewer copies than parameters, they
            belong to the first ones. The gradients of the first parameters may have one 16-bit
            dtype; the others are float32.
Spec        irongpt_kernels/eager.py::adamw
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.fused.grad_norm import (
    BLOCK,
    aligned,
    count_16bit,
    launches,
    load,
    load_gradient,
    programs,
    select_address,
)  # fmt: skip
from irongpt_kernels.runtime import checks
from irongpt_kernels.runtime.custom_op import custom_op


@triton.jit
def _store(address, offsets, x, mask, dtype: tl.constexpr):
    pointer = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
    tl.store(pointer + offsets, x.to(dtype), mask=mask)


@triton.jit
def _correction(t, log_beta):
    """1 - beta^t for t > 0, by the series of expm1 where beta^t is large and the subtraction would
    lose digits."""
    x = t * log_beta  # never positive
    series = 1.0 + x * (1.0 / 10)
    for i in tl.static_range(9, 1, -1):
        series = 1.0 + x * (1.0 / i) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _adamw_kernel(
    grads, weights, low_precision_params, exp_avgs, exp_avg_sqs, firsts, sizes, decays,
    steps_ptr, lr_ptr, stats_ptr,
    beta1, one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps,
    N: tl.constexpr, N_16BIT: tl.constexpr, N_COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of N tensors the first N_16BIT have 16-bit gradients, and the first N_COPIES have copies.

    weights: the parameters (Triton does not accept an argument named params). firsts: the id of the
    first program of each tensor. sizes: the number of elements of each tensor. steps_ptr: N numbers
    of steps. stats_ptr: the result of `grad_norm`.
    """
    program = tl.program_id(0)
    first, size, decay = 0, tl.cast(sizes[0], tl.int64), tl.cast(decays[0], tl.float32)
    g_at, p_at = grads[0].to(tl.int64), weights[0].to(tl.int64)
    m_at, v_at = exp_avgs[0].to(tl.int64), exp_avg_sqs[0].to(tl.int64)
    index, is_16bit, has_copy = 0, N_16BIT > 0, N_COPIES > 0
    copy_at = p_at
    if N_COPIES > 0:
        copy_at = low_precision_params[0].to(tl.int64)
    for i in tl.static_range(1, N):
        mine = program >= firsts[i]
        g_at, p_at = select_address(grads, i, mine, g_at), select_address(weights, i, mine, p_at)
        m_at = select_address(exp_avgs, i, mine, m_at)
        v_at = select_address(exp_avg_sqs, i, mine, v_at)
        if i < N_COPIES:
            copy_at = select_address(low_precision_params, i, mine, copy_at)
        index = tl.where(mine, i, index)
        first, size = tl.where(mine, firsts[i], first), tl.where(mine, sizes[i], size)
        decay = tl.where(mine, decays[i], decay)
        is_16bit = tl.where(mine, i < N_16BIT, is_16bit)
        has_copy = tl.where(mine, i < N_COPIES, has_copy)
    if tl.load(stats_ptr + 2) == 0.0:  # found_inf
        grad_scale, lr, t = tl.load(stats_ptr + 1), tl.load(lr_ptr), tl.load(steps_ptr + index)
        offsets = tl.cast(program - first, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < size
        dtype: tl.constexpr = grads[0].dtype.element_ty
        g = load_gradient(g_at, offsets, mask, is_16bit, N_16BIT > 0, N_16BIT < N, dtype)
        g = tl.div_rn(g, grad_scale)
        m = beta1 * load(m_at, offsets, mask, tl.float32) + one_minus_beta1 * g
        v = beta2 * load(v_at, offsets, mask, tl.float32) + one_minus_beta2 * (g * g)
        p = load(p_at, offsets, mask, tl.float32)
        p -= lr * decay * p
        denominator = tl.div_rn(tl.sqrt_rn(v), tl.sqrt_rn(_correction(t, log_beta2))) + eps
        p -= tl.div_rn(tl.div_rn(lr, _correction(t, log_beta1)) * m, denominator)
        _store(m_at, offsets, m, mask, tl.float32)
        _store(v_at, offsets, v, mask, tl.float32)
        _store(p_at, offsets, p, mask, tl.float32)
        if N_COPIES > 0:
            _store(copy_at, offsets, p, mask & has_copy, low_precision_params[0].dtype.element_ty)


def _adamw(
    params: list[Tensor], low_precision_params: list[Tensor], grads: list[Tensor],
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], state_steps: Tensor, lr: Tensor,
    stats: Tensor, *,
    beta1: float, beta2: float, weight_decays: list[float], eps: float = 1e-8,
) -> None:  # fmt: skip
    """See `eager.adamw`."""
    device, wide, sizes = lr.device, torch.float32, [p.shape for p in params]
    checks.addresses(wide, sizes, device, params=params, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    checks.copies(low_precision_params, sizes[: len(low_precision_params)], device)
    checks.gradients(grads, sizes, device)
    checks.memory(wide, (), device, lr=lr)
    checks.memory(wide, (3,), device, stats=stats)
    checks.memory(wide, (len(params),), device, state_steps=state_steps)
    if len(weight_decays) != len(params):
        raise ValueError(f"weight_decays must have {len(params)} values, got {len(weight_decays)}")
    grads = [aligned(g) for g in grads]
    betas = [x for beta in (beta1, beta2) for x in (beta, 1 - beta, math.log(beta or 5e-324))]
    lists = grads, params, low_precision_params, exp_avgs, exp_avg_sqs
    for part, firsts, count in launches(programs(params)):
        if count:
            some = [tuple(tensors[part]) for tensors in lists]
            numels = tuple(p.numel() for p in params[part])
            _adamw_kernel[(count,)](
                *some, firsts, numels, tuple(weight_decays[part]), state_steps[part], lr, stats,
                *betas, eps, N=len(numels), N_16BIT=count_16bit(some[0]), N_COPIES=len(some[2]),
                BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip


adamw = custom_op(
    "adamw", _adamw, mutates=("params", "low_precision_params", "exp_avgs", "exp_avg_sqs")
)
