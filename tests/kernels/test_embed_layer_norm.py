"""The embedding and the first norm: its gradients' two paths, frequent and absent tokens, ids."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from irongpt_kernels import eager, fused
from irongpt_kernels.op_inputs import RowShape
from numerics import DEVICE, assert_op, each_dtype, inputs_of, randn, run, values
from op_cases import Calls

module = importlib.import_module("irongpt_kernels.fused.embed_layer_norm")


def inputs(dtype: torch.dtype = torch.float32, V: int = 17, N: int = 19, B: int = 3, T: int = 7):
    made = inputs_of("embed_layer_norm", dtype, RowShape(B, 1, T, 16, V=V, M=-1, N=N))
    return {n: x.to(DEVICE) for n, x in made.items()}


@pytest.mark.parametrize("N", [3, 19, 130, 384])
@each_dtype
def test_widths(N: int, dtype) -> None:
    assert_op(fused, "embed_layer_norm", inputs(dtype, N=N))


@pytest.mark.parametrize("what", ["several parts", "one token", "more tokens than rows", "sorted"])
@each_dtype
def test_rows_of_a_token_are_added(what: str, dtype, monkeypatch) -> None:
    """A part is a multiple of 16 rows, of which the last one is not complete."""
    monkeypatch.setattr(module, "PART", 32)
    x = inputs(dtype, V=90 if what == "more tokens than rows" else 5, B=5, T=19)
    if what == "one token":
        x["idx"].fill_(3)
    if what == "sorted":
        x["idx"] = x["idx"].flatten().sort().values.view(5, 19)
    assert_op(fused, "embed_layer_norm", x)


def test_an_absent_token_has_a_gradient_of_0_and_others_that_of_their_rows() -> None:
    x = inputs(V=9)
    x["idx"] = x["idx"] % 4 * 2
    upstream = (values(3, 7, 19, seed=1), torch.zeros(3, 7, 19, device=DEVICE))
    _, (dwte, dwpe, *_) = run(fused.embed_layer_norm, x, upstream)
    assert not dwte[[1, 3, 5, 7, 8]].any()
    rows = upstream[0].double()
    wanted = torch.zeros(9, 19, dtype=torch.float64, device=DEVICE)
    wanted.index_add_(0, x["idx"].flatten(), rows.view(21, 19))
    torch.testing.assert_close(dwte.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dwpe.double(), rows.sum(0), rtol=1e-6, atol=1e-6)


@each_dtype
def test_a_large_vocabulary_takes_pytorchs_gradient(dtype, monkeypatch) -> None:
    x = inputs(dtype)
    upstream = tuple(randn(3, 7, 19, dtype=dtype, seed=i).to(DEVICE) for i in (1, 2))
    results = []
    for largest in (17, 16):
        monkeypatch.setattr(module, "MAX_V", largest)
        assert_op(fused, "embed_layer_norm", x, upstream)
        with Calls() as calls:
            results.append(run(fused.embed_layer_norm, x, upstream)[1])
        ours = torch.ops.irongpt.embedding_backward.default
        assert (ours in calls.found) == (largest == 17)
    assert all(map(torch.equal, results[0][2:], results[1][2:]))  # weight and bias


def test_the_norm_has_the_dtype_that_is_asked_for() -> None:
    x = inputs()
    for ops in (fused, eager):
        total, norm = ops.embed_layer_norm(**x, dtype=torch.float16)
        assert (total.dtype, norm.dtype) == (torch.float32, torch.float16)


@pytest.mark.skipif(DEVICE == "cuda", reason="ids are checked on the CPU only")
@pytest.mark.parametrize("bad", [-1, 17, -100])
def test_an_id_outside_the_vocabulary_is_rejected(bad: int) -> None:
    x = inputs()
    x["idx"][1, 2] = bad
    with pytest.raises(ValueError, match=rf"^idx must be in \[0, 17\), got {bad}$"):
        fused.embed_layer_norm(**x)


@each_dtype
def test_the_embedding_has_eagers_bits_and_the_norm_those_of_layer_norm(dtype) -> None:
    """It is the norm of the embedding after it is rounded to its dtype."""
    x = inputs(dtype)
    total, norm = fused.embed_layer_norm(**x)
    assert torch.equal(total, F.embedding(x["idx"], x["wte"]) + x["wpe"])
    assert torch.equal(norm, fused.layer_norm(total, x["weight"], x["bias"]))


def test_an_unknown_id_gives_nan_where_it_is_not_checked(monkeypatch) -> None:
    monkeypatch.setattr(module.checks, "ids", lambda *_, **__: None)
    wte, wpe, weight = (torch.ones(*size, device=DEVICE) for size in ((5, 16), (4, 16), (16,)))
    idx = torch.tensor([[0, -1, 5, 4]], device=DEVICE)
    x, norm, *_ = module.embed_layer_norm_fwd(wte, wpe, idx, weight, None, 1e-5, torch.float32)
    assert x.isnan().all(2).tolist() == norm.isnan().all(2).tolist() == [[False, True, True, False]]
    assert not x[0, [0, 3]].isnan().any()
