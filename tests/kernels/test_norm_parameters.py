"""The gradients of all norms' parameters in one kernel: the bits that each norm gives by itself."""

import importlib

import pytest
import torch
from irongpt_kernels import builtin, eager, fused
from numerics import DEVICE, EXACT, values
from torch import Tensor

module = importlib.import_module("irongpt_kernels.fused.norm_parameters")
N, ROWS = 19, 100


def chain(ops, x: Tensor, params: list[Tensor]) -> Tensor:
    """Three norms, of which the second has no bias."""
    y = ops.layer_norm(x, params[0], params[1])
    y, z = ops.dropout_add_layer_norm(y, x, params[2], dropout_p=0.3, seed=5)
    y, z = ops.dropout_add_layer_norm(z, y, params[3], params[4])
    return y + z


def parameters() -> list[Tensor]:
    return [values(N, seed=i).requires_grad_() for i in range(5)]


def gradients(ops, params: list[Tensor], views: list[Tensor]) -> list[Tensor]:
    loss = (chain(ops, values(ROWS, N, seed=9), views) * values(ROWS, N, seed=8)).sum()
    return list(torch.autograd.grad(loss, params))


def test_the_gradients_have_the_bits_of_separate_norms() -> None:
    params = parameters()
    views = fused.norm_parameters(params, ROWS, torch.float32)
    assert {v.shape for v in views} == {(4, N)}  # 32 rows to a program
    assert [v.data_ptr() for v in views] == [p.data_ptr() for p in params]
    found, apart = gradients(fused, params, views), gradients(fused, params, params)
    assert all(map(torch.equal, found, apart))


def test_any_number_of_programs_gives_the_gradients() -> None:
    """Also more than there are rows, and fewer than share them otherwise."""
    params = parameters()
    wanted = gradients(eager, params, params)
    for P in (1, 3, 100):
        found = gradients(fused, params, list(module._Rows.apply(P, *params)))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_kernel_adds_48_matrices_of_any_sizes() -> None:
    """Their widths are not multiples of a block, and their heights smaller and larger than one."""
    sizes = [(1 + 7 * i % 150, 1 + 11 * i % 70) for i in range(50)] + [(0, 5), (3, 0)]
    matrices = [values(*size, seed=i) for i, size in enumerate(sizes)]
    matrices[1] = matrices[1].t().contiguous().t()
    matrices[2] = matrices[2].half()
    for m, total in zip(matrices, module.column_sums(matrices), strict=True):
        assert total.dtype == torch.float32
        bound = len(m) * 2.0**-23 * m.abs().double().sum(0)
        assert ((total - m.double().sum(0)).abs() <= bound + EXACT).all()


def test_without_a_gradient_and_in_the_other_modules_the_parameters_stay_as_they_are() -> None:
    params = parameters()
    with torch.no_grad():
        same = [fused.norm_parameters(params, ROWS, torch.float32)]
    same.append(fused.norm_parameters([p.detach() for p in params], ROWS, torch.float32))
    same += [ops.norm_parameters(params, ROWS, torch.float32) for ops in (eager, builtin)]
    for found in same:
        assert [(v.shape, v.data_ptr()) for v in found] == [(p.shape, p.data_ptr()) for p in params]


def test_frozen_and_unused_parameters_get_no_gradient() -> None:
    params = parameters()
    params[1].requires_grad_(False)
    unused = values(N).requires_grad_()
    views = fused.norm_parameters([params[0], unused, *params[1:]], ROWS, torch.float32)
    chain(fused, values(ROWS, N, seed=9), [views[0], *views[2:]]).sum().backward()
    assert [p.grad is None for p in (*params, unused)] == [False, True, False, False, False, True]
    apart = parameters()
    chain(fused, values(ROWS, N, seed=9), apart).sum().backward()
    assert all(torch.equal(params[i].grad, apart[i].grad) for i in (0, 2, 3, 4))


def test_a_second_derivative_raises() -> None:
    params = parameters()
    views = fused.norm_parameters(params, ROWS, torch.float32)
    loss = chain(fused, values(ROWS, N), views).square().sum()
    (gradient, *_) = torch.autograd.grad(loss, params, create_graph=True)
    with pytest.raises(RuntimeError, match=r"_backward.*no autograd formula"):
        torch.autograd.grad(loss + gradient.square().sum(), params)


def test_a_matrix_of_different_rows_is_no_weight() -> None:
    x, weight = values(ROWS, N), values(2, N)
    with pytest.raises(ValueError, match=rf"^weight must have shape \({N},\), got \(2, {N}\)$"):
        fused.layer_norm(x, weight)
    views = module._Rows.apply(2, values(N).requires_grad_())
    with pytest.raises(ValueError, match=rf"^weight must have shape \({N},\), got \(2, {N}\)$"):
        fused.layer_norm(x, views[0], weight)


def test_it_compiles_without_a_graph_break() -> None:
    params, x = parameters(), values(ROWS, N, seed=9)

    def step(*params: Tensor) -> Tensor:
        return chain(fused, x, fused.norm_parameters(list(params), ROWS, torch.float32))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(*params).square().sum(), params) for f in (compiled, step)]
    assert all(map(torch.equal, *results))
    assert results[0][0].device.type == DEVICE
