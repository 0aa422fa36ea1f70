"""The shapes that `aot` compiles the kernels at: what decides tiles, warps and specializations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
BATCH, HEADS, CONTEXT = 64, 6, 256  # of the iron model, at which costs are given
TOKENS = BATCH * CONTEXT
TEXTS, V = 2, 109  # of the ops of one token
ROWS = 48  # of the tensors that stand in: a multiple of 16, like any row count of a real model
WIDTHS = [16, 32, 64, 128, 256, 384, 768, 1024, 2048, 4096, 8192]  # of rows in registers
Cost = Callable[[str], tuple[float, float]]  # fwd or bwd -> bytes, FLOPs (0: not counted)


@dataclass(frozen=True)
class Case:
    """A call of an op, forward and backward. shape: how a report names it."""

    op: str
    shape: str
    dtype: str
    make: Callable[[], dict[str, Any]]
    options: dict[str, Any]
    cost: Cost

    def run(self) -> None:
        """Calls the fused op on CPU tensors, and its gradient for every input that has one."""
        from irongpt_kernels import fused

        inputs = self.make()
        leaves = [
            x.detach().requires_grad_()
            for x in inputs.values()
            if isinstance(x, Tensor) and x.is_floating_point()
        ]
        named = iter(leaves)
        inputs = {
            n: next(named) if isinstance(x, Tensor) and x.is_floating_point() else x
            for n, x in inputs.items()
        }
        out = getattr(fused, self.op)(**inputs, **self.options)
        out = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
        torch.autograd.grad(out, leaves, [torch.ones_like(x) for x in out])


class Update(Case):
    """Of the optimizer, which has no backward: `make` calls it."""

    def run(self) -> None:
        self.make()


def every(arch: int) -> list[Case]:
    """All shapes for an architecture: every dtype that it computes in, every tile."""
    names = [n for n in DTYPES if n != "bfloat16" or arch >= 80]
    return [case for name in names for case in _cases(name)]


def representative(arch: int) -> list[Case]:
    """Those that a test can afford: each kernel in each dtype, each tile of attention, on sm_75
    padded heads too, and scalar attention, which takes LLVM long, where it is most crowded."""
    T, heads = CONTEXT, (32, 48, 64, 80, 96, 128) if arch == 75 else (64, 128)
    attention = [f"D={D} p=0.2 T={T} float16" for D in heads] + [f"D=64 p=0.2 T={T} bfloat16"]
    if arch == 75:
        attention += [f"D={D} p=0.0 T={T} float16" for D in (32, 64)] + ["D=64 p=0.2 T=250 float16"]
        attention += [f"D={D} p=0.2 T={T} float32" for D in (16, 128)]
    else:
        attention += ["D=32 p=0.0 T=256 float16", "D=80 p=0.2 T=256 float32"]
    norms = [f"N=384 p=0.2 {dtype}" for dtype in DTYPES] + ["N=384 float16"]
    norms += [f"N={N} p=0.2 float16" for N in (4096, 8192)]
    rows = [f"N={N} float16" for N in (384, 1536, 20_000)] + ["N=256 causal float16"]
    rows += [f"N=384 {dtype} {what}" for dtype in DTYPES for what in ("gradients", "matrices")]
    chosen = attention + norms + rows + [f"V={V} float16" for V in (109, 50257)]
    chosen += ["D=64 N=256 float16", "D=128 N=256 float32", "K=384 N=1152 gelu float16"]
    chosen += ["K=1536 N=384 float16", "V=109 draw 0 float16", "V=109 draw 2 float16"]
    chosen += ["C=384 float32"]
    return [case for case in every(arch) if case.shape in chosen]


def _cases(dtype: str) -> Iterator[Case]:
    zeros = partial(torch.zeros, dtype=DTYPES[dtype])
    yield from _attention(dtype, zeros)
    yield from _norms(dtype, zeros)
    yield from _softmax(dtype, zeros)
    yield from _cross_entropy(dtype, zeros)
    yield from _gelu(dtype, zeros)
    yield from _updates(dtype, zeros)
    yield from _decode(dtype, zeros)


def _attention(dtype: str, zeros: Any) -> Iterator[Case]:
    from irongpt_kernels.fused.attention import causal_attention_bytes, causal_attention_flops

    def make(T: int, D: int) -> dict[str, Any]:
        q, k, v = zeros(1, T, 3, 2, D).transpose(1, 3).unbind(2)  # views, as a projection gives
        return dict(q=q, k=k, v=v)

    for D in range(16, 129, 16):
        # A context that no tile divides has masked loops throughout.
        shapes = [(CONTEXT, 0.2), (CONTEXT, 0.0)] + ([(250, 0.2)] if D == 64 else [])
        for T, p in shapes:

            def cost(mode: str, D: int = D) -> tuple[float, float]:
                size = BATCH, HEADS, CONTEXT, D
                bytes_ = causal_attention_bytes(*size, DTYPES[dtype].itemsize, mode)
                return bytes_, causal_attention_flops(*size, mode)

            options = dict(dropout_p=p, seed=1)
            shape = f"D={D} p={p} T={T} {dtype}"
            yield Case("causal_attention", shape, dtype, partial(make, T, D), options, cost)


def _norms(dtype: str, zeros: Any) -> Iterator[Case]:
    from irongpt_kernels.fused.dropout_add_layer_norm import dropout_add_layer_norm_bytes
    from irongpt_kernels.fused.layer_norm import layer_norm_bytes

    size = DTYPES[dtype].itemsize
    for N in WIDTHS:
        for bias in (True, False) if N == 384 else (True,):

            def make(N: int = N, bias: bool = bias) -> dict[str, Any]:
                return dict(x=zeros(ROWS, N), weight=zeros(N), bias=zeros(N) if bias else None)

            def cost(mode: str, N: int = N) -> tuple[float, float]:
                return layer_norm_bytes(TOKENS, N, size, mode == "bwd"), 0

            shape = f"N={N} {dtype}" + ("" if bias else " no bias")
            yield Case("layer_norm", shape, dtype, make, {}, cost)
        for p in (0.0, 0.2):

            def sums(N: int = N) -> dict[str, Any]:
                residual = torch.zeros(ROWS, N)  # float32 throughout a training
                vectors = dict(weight=zeros(N), bias=zeros(N))
                return dict(branch=zeros(ROWS, N), residual=residual, **vectors)

            def cost_(mode: str, N: int = N) -> tuple[float, float]:
                return dropout_add_layer_norm_bytes(TOKENS, N, size, 4, mode == "bwd"), 0

            options = dict(dropout_p=p, seed=1)
            shape = f"N={N} p={p} {dtype}"
            yield Case("dropout_add_layer_norm", shape, dtype, sums, options, cost_)


def _softmax(dtype: str, zeros: Any) -> Iterator[Case]:
    from irongpt_kernels.fused.softmax import softmax_bytes

    for N, causal in [(CONTEXT, True), (384, False), (16384, False), (20_000, False)]:

        def cost(mode: str, N: int = N, causal: bool = causal) -> tuple[float, float]:
            M = BATCH * HEADS * N if causal else TOKENS
            return softmax_bytes(M, N, DTYPES[dtype].itemsize, mode, causal), 0

        def make(N: int = N, causal: bool = causal) -> dict[str, Any]:
            return dict(x=zeros(N, N) if causal else zeros(ROWS, N))

        shape = f"N={N} {'causal ' if causal else ''}{dtype}"
        yield Case("softmax", shape, dtype, make, dict(causal=causal), cost)


def _cross_entropy(dtype: str, zeros: Any) -> Iterator[Case]:
    from irongpt_kernels.fused.cross_entropy import cross_entropy_bytes

    for V in (109, 50257):

        def cost(mode: str, V: int = V) -> tuple[float, float]:
            return cross_entropy_bytes(TOKENS, V, DTYPES[dtype].itemsize, mode), 0

        def make(V: int = V) -> dict[str, Any]:
            return dict(logits=zeros(ROWS, V), targets=torch.arange(ROWS))

        yield Case("cross_entropy", f"V={V} {dtype}", dtype, make, {}, cost)


def _gelu(dtype: str, zeros: Any) -> Iterator[Case]:
    from irongpt_kernels.fused.gelu import gelu_bytes

    N = 4 * 384

    def cost(mode: str) -> tuple[float, float]:
        return gelu_bytes(TOKENS, N, DTYPES[dtype].itemsize, mode), 0

    for bias in (True, False):

        def make(bias: bool = bias) -> dict[str, Any]:
            return dict(x=zeros(ROWS, N), bias=zeros(N) if bias else None)

        shape = f"N={N} {dtype}" + ("" if bias else " no bias")
        yield Case("gelu", shape, dtype, make, {}, cost)


def _updates(dtype: str, zeros: Any) -> Iterator[Case]:
    """The weights of the iron model: those of its blocks have copies where `dtype` is 16-bit."""
    from irongpt_kernels.fused.adamw import adamw, adamw_bytes
    from irongpt_kernels.fused.grad_norm import grad_norm

    C, size = 384, DTYPES[dtype].itemsize

    def make(run: bool = True) -> int:
        shapes = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * 6 + [(109, C), (256, C)]
        shapes += [(C,)] * 13  # type: ignore[list-item]
        copies = 24 if size == 2 else 0
        if run:
            # Addresses and sizes of small tensors are specialized alike.
            params, m, v, wide = ([torch.zeros(ROWS * len(s)) for s in shapes] for _ in range(4))
            narrow = [p.to(DTYPES[dtype]) for p in params[:copies]]
            numbers, one = torch.zeros(len(params)), torch.ones(())
            grads = [*narrow, *wide[copies:]]
            count = torch.zeros((), dtype=torch.int64)
            growth_interval = 2000 if dtype == "float16" else 0
            stats = grad_norm(
                grads, one, count, numbers, max_norm=1.0, growth_interval=growth_interval
            )
            lists = (params, narrow, grads, m, v)
            decays = [0.1 * (len(s) - 1) for s in shapes]
            adamw(*lists, numbers, one, stats, beta1=0.9, beta2=0.999, weight_decays=decays)
        return sum(torch.Size(s).numel() for s in shapes)

    def cost(mode: str) -> tuple[float, float]:
        return adamw_bytes(make(False), size, 2 if size == 2 else 0), 0

    yield Update("adamw", f"N={C} {dtype} gradients", dtype, make, {}, cost)  # type: ignore[arg-type]
    yield from _muon(dtype)


def _muon(dtype: str) -> Iterator[Case]:
    """The iron model's six matrices of one shape, products in the type of the step."""
    from irongpt_kernels.fused import muon

    C, size = 384, DTYPES[dtype].itemsize

    def make() -> dict[str, Any]:
        params = [torch.zeros(C, C) for _ in range(6)]
        narrow = [p.to(DTYPES[dtype]) for p in params]
        momentum, stats = torch.zeros(6, C, C), torch.ones(3)
        y = muon.muon_momentum(narrow, momentum, stats, beta=0.95, dtype=DTYPES[dtype])
        copies = narrow if size == 2 else []
        muon.muon_update(params, copies, y, stats[0], stats, scale=1.0, weight_decay=0.1)
        return {}

    def cost(mode: str) -> tuple[float, float]:
        return muon.muon_bytes(6 * C * C, size, size, 2 if size == 2 else 0), 0

    yield Update("muon", f"N={C} {dtype} matrices", dtype, make, {}, cost)


@dataclass(frozen=True)
class Token(Case):
    """An op of a token, which has no gradient."""

    def run(self) -> None:
        """Calls the fused op on CPU tensors."""
        from irongpt_kernels import fused

        getattr(fused, self.op)(**self.make(), **self.options)


def _decode(dtype: str, zeros: Any) -> Iterator[Case]:
    """zeros: makes tensors of dtype."""
    from irongpt_kernels.fused.decode_attention import decode_attention_bytes
    from irongpt_kernels.fused.decode_linear import row_linear_bytes

    size, heads = DTYPES[dtype].itemsize, HEADS
    counts = torch.zeros(TEXTS, 2, dtype=torch.int64)

    def case(op: str, shape: str, inputs: dict[str, Any], bytes_: int, **options: Any) -> Token:
        name = f"{shape} {dtype}"
        return Token(op, name, dtype, lambda: dict(inputs), options, lambda _: (bytes_, 0))

    for D in range(16, 129, 16):
        cache = zeros(2, TEXTS, heads, CONTEXT, D).unbind()
        inputs = dict(qkv=zeros(TEXTS, 1, 3, heads, D), position=counts[:, 1])
        bytes_ = decode_attention_bytes(1, heads, CONTEXT, D, size)
        inputs |= dict(cache_k=cache[0], cache_v=cache[1])
        yield case("decode_attention", f"D={D} N={CONTEXT}", inputs, bytes_)

    for K, N in [(16, 16), (384, 1152), (384, V), (1024, 4096), (4096, 1024)]:
        weight, bias, norm = zeros(N, K), torch.zeros(N), torch.zeros(K)
        inputs = dict(x=torch.zeros(TEXTS, K), weight=weight, norm_weight=norm)
        bytes_ = row_linear_bytes(N, K, size)
        for gelu in (False, True):
            both = inputs | dict(norm_bias=norm, bias=bias) if gelu else inputs
            shape = f"K={K} N={N}{' gelu' if gelu else ''}"
            yield case("norm_linear", shape, both, bytes_, gelu=gelu)
    for K, N in [(16, 16), (384, 384), (1536, 384), (4096, 1024)]:
        inputs = dict(x=zeros(TEXTS, K), weight=zeros(N, K), residual=torch.zeros(TEXTS, N))
        yield case("linear_add", f"K={K} N={N}", inputs, row_linear_bytes(N, K, size))

    tokens = torch.zeros(TEXTS, 32, dtype=torch.int64)
    for columns in (V, 50257):
        logits, shape = zeros(TEXTS, columns), f"V={columns} draw"
        options: list[dict[str, Any]] = [{}, dict(temperature=0.0), dict(top_k=20, top_p=0.9)]
        for i, option in enumerate(options):
            inputs = dict(logits=logits, tokens=tokens, counts=counts, seed=1)
            bytes_ = columns * size
            yield case("sample_tokens", f"{shape} {i}", inputs, bytes_, **option)
    if dtype == "float32":
        embeddings = dict(wte=zeros(V, 384), wpe=zeros(CONTEXT, 384))
        inputs = dict(tokens=tokens, counts=counts, **embeddings)
        yield case("embed_tokens", "C=384", inputs, 3 * 384 * size)
