"""The shapes of one token's kernels for `aot`: see `shapes`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from irongpt_kernels.aot import shapes

TEXTS, CONTEXT = 2, 256
V = 109


@dataclass(frozen=True)
class Token(shapes.Case):
    """An op of a token, which has no gradient."""

    def run(self) -> None:
        """Calls the fused op on CPU tensors."""
        from irongpt_kernels import fused

        getattr(fused, self.op)(**self.make(), **self.options)


def cases(dtype: str, zeros: Any) -> Iterator[shapes.Case]:
    """zeros: makes tensors of dtype."""
    from irongpt_kernels.fused.decode_attention import cached_attention_bytes
    from irongpt_kernels.fused.decode_linear import row_linear_bytes

    size, heads = shapes.DTYPES[dtype].itemsize, shapes.HEADS
    counts = torch.zeros(TEXTS, 2, dtype=torch.int64)

    def case(op: str, shape: str, inputs: dict[str, Any], bytes_: int, **options: Any) -> Token:
        name = f"{shape} {dtype}"
        return Token(op, name, dtype, lambda: dict(inputs), options, lambda _: (bytes_, 0))

    for D in range(16, 129, 16):
        cache = zeros(2, TEXTS, heads, CONTEXT, D).unbind()
        inputs = dict(qkv=zeros(TEXTS, 1, 3, heads, D), position=counts[:, 1])
        bytes_ = cached_attention_bytes(1, heads, CONTEXT, D, size)
        inputs |= dict(cache_k=cache[0], cache_v=cache[1])
        yield case("cached_attention", f"D={D} N={CONTEXT}", inputs, bytes_)

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
            yield case("draw_tokens", f"{shape} {i}", inputs, bytes_, **option)
    if dtype == "float32":
        embeddings = dict(wte=zeros(V, 384), wpe=zeros(CONTEXT, 384))
        inputs = dict(tokens=tokens, counts=counts, **embeddings)
        yield case("embed_tokens", "C=384", inputs, 3 * 384 * size)
