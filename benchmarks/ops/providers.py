"""The implementations of an op that are timed: ours, PyTorch's, and those of other packages.

    eager            irongpt_kernels.eager: the specification. With dropout it emulates the kernels'
                     masks by integer arithmetic, too slow to train with: see naive
    naive            attention without a fused function; one-token ops (not norm_linear) as PyTorch
                     programs have them, decode_attention with scaled_dot_product_attention
    builtin          PyTorch's own fused functions; attention: the backend that PyTorch picks
    chunked          torch's linear_cross_entropy with options (torch 2.13 or newer), which computes
                     the gradients along with the loss; without options it does what builtin does
    flash, cudnn,    attention by one named backend of scaled_dot_product_attention
    efficient, math
    compile          torch.compile of naive, or of builtin if the op has no naive version; not for
                     the optimizers, which PyTorch fuses itself
    fused            the Triton kernels
    liger, flash-attn    those packages, if they are installed

A provider takes the inputs and returns the output or outputs. In 16 bits the ops with a gradient
run under autocast.
"""

import contextlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from irongpt_kernels import builtin
from irongpt_kernels.builtin import append_by_indexing
from irongpt_kernels.op_inputs import RING_SIZE, TOP_K
from irongpt_kernels.op_specs import LAYERS, TOKEN
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ops.cases import AS_EAGER, OPS, Case, Inputs
from irongpt import device as devices
from irongpt import ops
from irongpt.errors import UserError

Outputs = Any  # a tensor, or a tuple of them
Function = Callable[[Inputs], Outputs]

ATTENTION = ("causal_attention", "causal_attention_packed")
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NAMES = ("eager", "naive", "builtin", "chunked", *BACKENDS)
NAMES += ("compile", "fused", "liger", "flash-attn")
OPS_OF = {  # the ops of a provider that does not have all of them
    "naive": (*ATTENTION, *(spec.name for spec in TOKEN if spec.name != "norm_linear")),
    "builtin": tuple(op for op in OPS if op not in AS_EAGER),
    "chunked": ("linear_cross_entropy",),
    **dict.fromkeys((*BACKENDS, "flash-attn"), ATTENTION),
    "compile": tuple(spec.name for spec in (*LAYERS, *TOKEN)),
    "liger": ("layer_norm", "cross_entropy", "linear_cross_entropy"),
}
PACKAGES = {"liger": "liger_kernel", "flash-attn": "flash_attn"}
COLDEST = 1e-6  # a temperature at which the most likely token is sampled


class Provider(NamedTuple):
    """own_masks: its dropout has another generator, so it is checked without dropout.

    around: a context for many calls. backend: that of attention, if PyTorch picks one.
    """

    function: Function
    own_masks: bool = True
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    backend: str | None = None


def missing(device: torch.device, names: tuple[str, ...] = NAMES) -> dict[str, str]:
    """Those of `names` that cannot run here, and why."""
    reasons = {}
    if "fused" in names:
        try:
            ops.load("fused", device)
        except UserError as e:
            reasons["fused"] = str(e)
    for name, package in PACKAGES.items():
        if not importlib.util.find_spec(package):
            reasons[name] = f"{package} is not installed"
        elif device.type != "cuda":
            reasons[name] = "it needs a GPU"
    if not hasattr(F, "linear_cross_entropy"):
        reasons["chunked"] = "torch is older than 2.13"
    if device.type != "cuda":
        reasons |= dict.fromkeys(("cudnn", "efficient"), "a CPU has no such backend")
    return {name: why for name, why in reasons.items() if name in names}


def computes(name: str, op: str) -> bool:
    """Whether a provider has the op at all."""
    return op in OPS_OF.get(name, OPS)


def providers(
    case: Case, device: torch.device, names: tuple[str, ...] = NAMES
) -> dict[str, Provider]:
    """Those of `names` that compute the op and are not missing."""
    without = missing(device, names)
    here = [name for name in names if name not in without and computes(name, case.op)]
    runnable = {name: _provider(name, case, device) for name in here}
    if not case.spec.differentiable:  # optimizers and decoding steps do not run under autocast
        return runnable

    def under_autocast(function: Function, x: Inputs) -> Outputs:
        with devices.autocast(device, case.dtype):
            return function(x)

    return {
        name: p._replace(function=partial(under_autocast, p.function))
        for name, p in runnable.items()
    }


def _provider(name: str, case: Case, device: torch.device) -> Provider:
    if name in ("eager", "fused"):
        return Provider(by(ops.load(name, device), case, device), own_masks=False)
    if name == "builtin":
        picked = backend(case, device) if case.op in ATTENTION else None
        return Provider(by(builtin, case, device), backend=picked)
    if name in BACKENDS:
        return Provider(partial(_sdpa, case), around=partial(only, BACKENDS[name]))
    makers: dict[str, Callable[[Case], Function]] = {
        "naive": _naive,
        "chunked": lambda case: _chunked,
        "compile": partial(_compiled, device=device),
        "liger": _liger,
        "flash-attn": _flash_attn,
    }
    return Provider(makers[name](case))


def _compiled(case: Case, device: torch.device) -> Function:
    """torch.compile for static shapes, with a backward that can run again to be timed."""
    from torch._functorch import config

    config.donated_buffer = False
    torch._dynamo.reset()
    plain = _naive(case) if computes("naive", case.op) else by(builtin, case, device)
    result: Function = torch.compile(plain, dynamic=False)
    return result


def naive_attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """q, k, v: (B, H, T, D). As nanoGPT and most tutorials write it."""
    T, D = q.shape[-2:]
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(D)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    weights = F.softmax(scores.masked_fill(future, -math.inf), -1)
    return F.dropout(weights, p) @ v


def _naive_packed(qkv: Tensor, *, dropout_p: float = 0.0, seed: Any = None) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return naive_attention(q, k, v, dropout_p).transpose(1, 2).contiguous()


# The ops of `builtin`, but attention in plain PyTorch: a model without fused attention.
NAIVE: Any = SimpleNamespace(**vars(builtin) | {"causal_attention_packed": _naive_packed})


def by(module: Any, case: Case, device: torch.device) -> Function:
    """The op of a module of ops."""
    options = case.options(device)
    return lambda x: case.spec.run(module, case.shape, x, **options)


def _unpacked(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x["qkv"].permute(2, 0, 3, 1, 4) if "qkv" in x else (x["q"], x["k"], x["v"])
    return q, k, v


def _packed_like(case: Case, out: Tensor) -> Tensor:
    """out (B, H, T, D) in the layout that the op returns."""
    out = out.transpose(1, 2).contiguous()
    return out if case.op == "causal_attention_packed" else out.transpose(1, 2)


def _naive(case: Case) -> Function:
    """Plain PyTorch, which torch.compile accepts. Unlike builtin's ops, these need not sample the
    same token as eager."""
    functions: dict[str, Function] = {
        "embed_tokens": _embed,
        "decode_attention": _decode_attention,
        "linear_add": lambda x: (x["residual"] + F.linear(x["x"], x["weight"]),),
        "sample_tokens": partial(_sample, temperature=case.p),
    }

    def attention(x: Inputs) -> Tensor:
        return _packed_like(case, naive_attention(*_unpacked(x), p=case.p))

    return functions.get(case.op, attention)


def _embed(x: Inputs) -> tuple[Tensor, ...]:
    rows = torch.arange(len(x["tokens"]), device=x["tokens"].device)
    last = x["tokens"][rows, (x["counts"][:, 0] - 1) % RING_SIZE]
    return (F.embedding(last, x["wte"]) + F.embedding(x["counts"][:, 1], x["wpe"]),)


def _decode_attention(x: Inputs) -> tuple[Tensor, ...]:
    """A static cache: one row is written, and a mask hides those that are not filled yet."""
    cache_k, cache_v = x["cache_k"], x["cache_v"]
    q, k, v = x["qkv"].permute(2, 0, 3, 1, 4)  # (B, H, 1, D)
    seen = append_by_indexing(k[:, :, 0], v[:, :, 0], cache_k, cache_v, x["position"])[:, :, None]
    out = F.scaled_dot_product_attention(q, cache_k, cache_v, attn_mask=seen)
    return out.transpose(1, 2), cache_k, cache_v


def _sample(x: Inputs, temperature: float) -> tuple[Tensor, ...]:
    logits, tokens, counts = x["logits"], x["tokens"], x["counts"]
    scores = logits.float() / max(temperature, COLDEST)
    best, which = scores.topk(min(TOP_K, logits.shape[1]))
    # As multinomial samples, but without its checks, for which the host waits.
    race = best.softmax(-1) / torch.empty_like(best).exponential_()
    sampled = which.gather(1, race.argmax(-1, keepdim=True))
    tokens.scatter_(1, counts[:, :1] % RING_SIZE, sampled)
    counts += 1
    return tokens, counts


def _sdpa(case: Case, x: Inputs) -> Tensor:
    out = F.scaled_dot_product_attention(*_unpacked(x), dropout_p=case.p, is_causal=True)
    return _packed_like(case, out)


def _chunked(x: Inputs) -> Tensor:
    # The gradients can be read twice, to be timed.
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return F.linear_cross_entropy(x["x"], x["weight"], x["targets"], options=options).float()


@contextlib.contextmanager
def only(backend: SDPBackend) -> Iterator[None]:
    """Selects one backend of scaled_dot_product_attention. A call that it cannot run raises."""
    with sdpa_kernel([backend]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exception has the reason
        yield


def backend(case: Case, device: torch.device) -> str:
    """The backend that PyTorch picks for `builtin`, by our name for it."""
    small = replace(case, shape=replace(case.shape, B=1))
    q, k, v = _unpacked(small.inputs(device))
    picked = torch._fused_sdp_choice(q, k, v, None, case.p, True)
    names = {value.value: name for name, value in BACKENDS.items()}
    return names.get(picked, str(picked))


def _liger(case: Case) -> Function:
    if case.op == "layer_norm":
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        def norm(x: Inputs) -> Outputs:
            weight = x["weight"].to(x["x"].dtype)
            return LigerLayerNormFunction.apply(x["x"], weight, torch.zeros_like(weight), 1e-5)

        return norm
    if case.op == "linear_cross_entropy":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda x: liger_fused_linear_cross_entropy(x["x"], x["weight"], x["targets"])
    from liger_kernel.transformers.functional import liger_cross_entropy

    # It writes the gradient over its input: a copy, so that it can be run again.
    return lambda x: liger_cross_entropy(x["logits"].clone(), x["targets"])


def _flash_attn(case: Case) -> Function:
    from flash_attn import flash_attn_func, flash_attn_qkvpacked_func

    if case.op == "causal_attention_packed":
        return lambda x: flash_attn_qkvpacked_func(x["qkv"], dropout_p=case.p, causal=True)

    def function(x: Inputs) -> Outputs:
        q, k, v = (t.transpose(1, 2) for t in _unpacked(x))  # (B, T, H, D)
        return flash_attn_func(q, k, v, dropout_p=case.p, causal=True).transpose(1, 2)

    return function
