"""Who computes an op: ours, PyTorch's, and what else is installed.

    eager            irongpt_kernels.eager: the specification. With dropout it emulates the kernels'
                     masks by integer arithmetic, too slow to train with: see naive
    naive            attention as it is written without a fused function, by F.dropout; of the ops
                     of one token, what one would write: see `inplace_ops`
    builtin          PyTorch's own fused functions; attention: the backend that PyTorch picks
    flash, cudnn,    attention by one named backend of scaled_dot_product_attention
    efficient, math
    compile          torch.compile of what one would write: naive where there is one, builtin
                     else; the optimizers are not compiled, PyTorch's are fused as they are
    fused            the Triton kernels
    liger, flash-attn    those packages, where they are installed

A provider takes the inputs and returns the output or outputs; in 16 bits under autocast, but for
the ops of `inplace_ops`.
"""

import contextlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from irongpt_kernels import builtin, eager
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ops import inplace_ops
from benchmarks.ops.cases import Case, Inputs
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
NAMES = (
    *("eager", "naive", "builtin", *BACKENDS),
    *("compile", "fused", "liger", "flash-attn"),
)


class Provider(NamedTuple):
    """own_masks: it drops by a generator of its own, so it is checked without dropout.

    around: entered once about many calls. backend: of attention, where PyTorch picks one.
    """

    function: Function
    own_masks: bool = True
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    backend: str | None = None

    def under(
        self, autocast: Callable[[], contextlib.AbstractContextManager[object]]
    ) -> "Provider":
        """The same, called as it is in a training."""

        def function(x: Inputs) -> Outputs:
            with autocast():
                return self.function(x)

        return self._replace(function=function)


def missing(device: torch.device, names: tuple[str, ...] = NAMES) -> dict[str, str]:
    """Those of `names` that have no row here, and why."""
    found = {}
    if "fused" in names:
        try:
            ops.load("fused", device)
        except UserError as e:
            found["fused"] = str(e)
    for name, (package, _) in PEERS.items():
        if name in names and not importlib.util.find_spec(package):
            found[name] = f"{package} is not installed"
        elif name in names and device.type != "cuda":
            found[name] = "it needs a GPU"
    if device.type != "cuda":
        found |= dict.fromkeys(("cudnn", "efficient"), "a CPU has no such backend")
    return {name: why for name, why in found.items() if name in names}


def computes(name: str, op: str) -> bool:
    """Whether a provider has the op at all."""
    if name == "naive":
        return op in ATTENTION or (op in inplace_ops.TOKEN and op != "norm_linear")
    if name in ("flash-attn", *BACKENDS):
        return op in ATTENTION
    if op in inplace_ops.OPS:
        here = {"builtin": op not in inplace_ops.AS_EAGER, "compile": op in inplace_ops.TOKEN}
        return here.get(name, name in ("eager", "fused"))
    return op in ("layer_norm", "cross_entropy") if name == "liger" else True


def providers(
    case: Case, device: torch.device, names: tuple[str, ...] = NAMES
) -> dict[str, Provider]:
    """Those of `names` that compute the op and are not missing."""
    found: dict[str, Provider] = {}
    without = missing(device, names)
    for name in names:
        if name in without or not computes(name, case.op):
            continue
        if name == "eager":
            found[name] = Provider(by(eager, case, device), own_masks=False)
        elif name == "builtin":
            picked = backend(case, device) if case.op in ATTENTION else None
            found[name] = Provider(by(builtin, case, device), backend=picked)
        elif name == "fused":
            module = ops.load("fused", device)
            found[name] = Provider(by(module, case, device), own_masks=False)
        elif name == "compile":
            plain = _naive(case) if computes("naive", case.op) else by(builtin, case, device)
            found[name] = Provider(compiled(plain))
        elif name == "naive":
            found[name] = Provider(_naive(case))
        elif name in BACKENDS:
            found[name] = Provider(_sdpa(case), around=partial(only, BACKENDS[name]))
        else:
            found[name] = Provider(PEERS[name][1](case))
    if case.op in inplace_ops.OPS:  # an optimizer and a token are not under autocast
        return found
    autocast = partial(devices.autocast, device, case.dtype)
    return {name: provider.under(autocast) for name, provider in found.items()}


def compiled(function: Function) -> Function:
    """torch.compile, of static shapes, and such that its backward can be run again to be timed."""
    from torch._functorch import config

    config.donated_buffer = False
    torch._dynamo.reset()
    made: Function = torch.compile(function, dynamic=False)
    return made


def naive_attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """q, k, v: (B, H, T, D). As nanoGPT and most tutorials write it."""
    T, D = q.shape[-2:]
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(D)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    weights = F.softmax(scores.masked_fill(future, -math.inf), -1)
    return F.dropout(weights, p) @ v


class Naive:
    """The ops of `builtin`, with attention written out: what a model costs without any kernel."""

    @staticmethod
    def causal_attention_packed(qkv: Tensor, *, dropout_p: float = 0.0, seed: Any = None) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return naive_attention(q, k, v, dropout_p).transpose(1, 2).contiguous()

    softmax = staticmethod(builtin.softmax)
    layer_norm = staticmethod(builtin.layer_norm)
    dropout_add_layer_norm = staticmethod(builtin.dropout_add_layer_norm)
    grad_norm, adamw = staticmethod(builtin.grad_norm), staticmethod(builtin.adamw)
    muon_momentum = staticmethod(builtin.muon_momentum)
    muon_update = staticmethod(builtin.muon_update)
    gelu = staticmethod(builtin.gelu)
    cross_entropy = staticmethod(builtin.cross_entropy)


def by(module: Any, case: Case, device: torch.device) -> Function:
    """The op of a module of ops."""
    options = case.options(device)
    return lambda x: case.spec.run(module, case.shape, x, **options)


def _unpacked(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x["qkv"].permute(2, 0, 3, 1, 4) if "qkv" in x else (x["q"], x["k"], x["v"])
    return q, k, v


def _packed_like(case: Case, out: Tensor) -> Tensor:
    """out: (B, H, T, D). In the layout that the op returns."""
    out = out.transpose(1, 2).contiguous()
    return out if case.op == "causal_attention_packed" else out.transpose(1, 2)


def _naive(case: Case) -> Function:
    if case.op in inplace_ops.OPS:
        return inplace_ops.naive(case.op, case.p)
    return lambda x: _packed_like(case, naive_attention(*_unpacked(x), p=case.p))


def _sdpa(case: Case) -> Function:
    def function(x: Inputs) -> Tensor:
        q, k, v = _unpacked(x)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=case.p, is_causal=True)
        return _packed_like(case, out)

    return function


@contextlib.contextmanager
def only(backend: SDPBackend) -> Iterator[None]:
    """One backend of scaled_dot_product_attention; where it refuses, the call raises."""
    with sdpa_kernel([backend]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why it refuses; told by the exception
        yield


def backend(case: Case, device: torch.device) -> str:
    """The backend that PyTorch picks for `builtin`, by our name for it."""
    small = replace(case, shape=replace(case.shape, B=1))
    q, k, v = _unpacked(small.inputs(device))
    picked = torch._fused_sdp_choice(q, k, v, None, case.p, True)
    names = {int(value.value): name for name, value in BACKENDS.items()}
    return names.get(picked, str(picked))


def _liger(case: Case) -> Function:
    if case.op == "layer_norm":
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        def norm(x: Inputs) -> Tensor:
            weight = x["weight"].to(x["x"].dtype)
            out: Tensor = LigerLayerNormFunction.apply(
                x["x"], weight, torch.zeros_like(weight), 1e-5
            )
            return out

        return norm
    from liger_kernel.transformers.functional import liger_cross_entropy

    # It writes the gradient over its input: a copy, so that it can be run again.
    return lambda x: liger_cross_entropy(x["logits"].clone(), x["targets"])


def _flash_attn(case: Case) -> Function:
    from flash_attn import flash_attn_func, flash_attn_qkvpacked_func

    if case.op == "causal_attention_packed":
        return lambda x: flash_attn_qkvpacked_func(x["qkv"], dropout_p=case.p, causal=True)

    def function(x: Inputs) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in _unpacked(x))  # (B, T, H, D)
        out: Tensor = flash_attn_func(q, k, v, dropout_p=case.p, causal=True)
        return out.transpose(1, 2)

    return function


PEERS: dict[str, tuple[str, Callable[[Case], Function]]] = {
    "liger": ("liger_kernel", _liger),
    "flash-attn": ("flash_attn", _flash_attn),
}
