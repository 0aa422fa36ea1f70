"""A GPT-2 style decoder (Radford et al. 2019), written once for all implementations of its ops.

B batch, T positions, C width, H heads, D = C / H head dimension, L blocks, V vocabulary.
"""

import copyreg
import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from irongpt_kernels import Ops
from torch import Tensor, nn

from irongpt.config import GPTConfig

DROPOUTS_PER_BLOCK = 3  # attention weights, attention branch, MLP branch
PADDED_ON = ("cuda",)  # device types on which training pads the head: see `padded_vocab`
# Copies and pickles of a model have its ops, which are a module, by their name.
copyreg.pickle(ModuleType, lambda ops: (importlib.import_module, (ops.__name__,)))


def padded_vocab(V: int) -> int:
    """Rows of the head in training: V, or if cuBLAS's fast kernels cannot take V, a few more.

    They need rows of 16-bit logits that begin at multiples of 16 bytes, which are 8 logits. If V is
    not a multiple of 8, it is padded to the next one, and from 1,024 on to the next multiple of 64,
    at a cost of 6.2 % at most, so that a row is a whole number of cache lines (128 bytes): GPT-2's
    50,257 become 50,304.
    """
    multiple = 8 if V < 1024 else 64
    return V if V % 8 == 0 else -(-V // multiple) * multiple


class LayerNorm(nn.Module):
    """The parameters of a layer norm. An op applies them together with the add before the norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None


NormParameters = tuple[Tensor, Tensor | None]  # weight and bias


class Linear(nn.Linear):
    """A linear layer whose weight may have a 16-bit copy: see `GPT.make_low_precision_params`.

    The copy is not a parameter: a state_dict holds `weight` alone, in float32.
    """

    low_precision_weight: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """The weight to multiply by. Without a copy autocast casts it at every use."""
        return self.weight if self.low_precision_weight is None else self.low_precision_weight

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.low_precision_weight is not None:
            with torch.no_grad():
                self.low_precision_weight.copy_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.bias)


class Attention(nn.Module):
    """(B, T, C) -> (B, T, C). The keys and values are also written to the cache, if given."""

    def __init__(self, config: GPTConfig, ops: Ops, layer: int) -> None:
        super().__init__()
        self.config, self.ops, self.layer = config, ops, layer
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, x: Tensor, dropout_p: float, seed: int | Tensor | None, cache: "KVCache | None"
    ) -> Tensor:
        B, T, C = x.shape
        H, D = self.config.n_head, C // self.config.n_head
        qkv = self.qkv(x).view(B, T, 3, H, D)
        if cache is not None:
            cache.write(self.layer, qkv)
        y = self.ops.causal_attention_packed(qkv, dropout_p=dropout_p, seed=seed)
        return self.proj(y.reshape(B, T, C))


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C), through 4 C hidden features."""

    def __init__(self, config: GPTConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.ops.gelu(F.linear(x, self.fc.matrix), self.fc.bias))  # adds the bias


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    An add and the norm after it are one op. So a block takes the residual stream and its norm,
    (B, T, C) each, and returns the new ones. ln_2, next_norm: the parameters of its second norm and
    of the norm that the next block or the head needs. seeds: one for each dropout of the block.
    """

    def __init__(self, config: GPTConfig, ops: Ops, layer: int) -> None:
        super().__init__()
        self.ops = ops
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config, ops, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config, ops)

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        ln_2: NormParameters,
        next_norm: NormParameters,
        dropout_p: float,
        seeds: Sequence[int | Tensor | None],
        cache: "KVCache | None",
    ) -> tuple[Tensor, Tensor]:
        add_norm = self.ops.dropout_add_layer_norm
        branch = self.attn(normed, dropout_p, seeds[0], cache)
        x, normed = add_norm(branch, x, *ln_2, dropout_p=dropout_p, seed=seeds[1])
        branch = self.mlp(normed)
        return add_norm(branch, x, *next_norm, dropout_p=dropout_p, seed=seeds[2])


class GPT(nn.Module):
    """Token ids in, logits out. The output head is the token embedding's matrix.

    `ops` is eager, builtin or fused of irongpt_kernels. It holds no parameters, so a state_dict
    fits a model on any ops.
    """

    def __init__(self, config: GPTConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, ops, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config)
        self.seed_offsets: Tensor  # (n, 2), row i holds i twice: `_seeds` has the reason
        self.register_buffer("seed_offsets", self._seed_offsets(), persistent=False)
        self.apply(self._init_weights)

    def _seed_offsets(self) -> Tensor:
        n = DROPOUTS_PER_BLOCK * self.config.n_layer
        return torch.arange(n, device=self.wte.weight.device)[:, None].repeat(1, 2)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        found = super().load_state_dict(*args, **options)
        self.seed_offsets = self._seed_offsets()  # `to_empty` leaves them uninitialized
        return found

    def _init_weights(self, module: nn.Module) -> None:
        """As in GPT-2: std 0.02, divided by sqrt(2 L) for projections into the residual stream.

        qkv and fc have `branch_std` instead: 0.02 is far below 1 / sqrt(C) in a narrow model.
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Attention | MLP):  # after its children: apply goes bottom-up
            with torch.no_grad():
                module.proj.weight /= math.sqrt(2 * self.config.n_layer)
                first = module.qkv if isinstance(module, Attention) else module.fc
                first.weight *= self.config.branch_std / 0.02

    def make_low_precision_params(self, dtype: torch.dtype) -> dict[Tensor, Tensor]:
        """Gives each Linear a copy of its weight in `dtype` for its matmul. Returns {weight: copy}.

        The copies are leaves and get the gradients, in `dtype`; an optimizer updates the float32
        weights and their copies. A step then casts none of these weights, forward or
        backward. Loading a state_dict updates the copies.
        """
        copies: dict[Tensor, Tensor] = {}
        for m in self.modules():
            if isinstance(m, Linear):
                copy = m.weight.detach().to(dtype, copy=True).requires_grad_()
                copies[m.weight] = m.low_precision_weight = copy
        return copies

    def forward(
        self, idx: Tensor, *, seed: int | Tensor | None = None, cache: "KVCache | None" = None
    ) -> Tensor:
        """idx (B, T) int64 -> logits (B, T, V) for the token after each.

        In training mode dropout is on; eager and fused ops need `seed` for its masks. The keys and
        values of idx are written to the cache, if given, at positions 0 to T - 1. Raises ValueError
        if T exceeds the context, or if `seed` is needed and missing.
        """
        return F.linear(self.hidden(idx, seed, cache), self.wte.weight)

    def hidden(
        self, idx: Tensor, seed: int | Tensor | None = None, cache: "KVCache | None" = None
    ) -> Tensor:
        """As `forward` without the head: the output of the last norm, (B, T, C)."""
        T, context = idx.shape[1], self.config.context
        if context < T:
            raise ValueError(f"{T} positions, but the context is {context}")
        dropout_p = self.config.dropout if self.training else 0.0
        # A slice, even of all rows, would add two passes over the gradient to the backward.
        positions = self.wpe.weight if context == T else self.wpe.weight[:T]
        blocks = cast(Sequence[Block], self.blocks)
        dtype = blocks[0].attn.qkv.matrix.dtype
        first, *norms = self._norms(idx.numel(), dtype)
        x, normed = self.ops.embed_layer_norm(
            self.wte.weight, positions, idx, *first, dtype=dtype
        )  # (B, T, C)
        seeds = self._seeds(seed)
        for i, block in enumerate(blocks):
            ln_2, next_norm = norms[2 * i : 2 * i + 2]
            x, normed = block(x, normed, ln_2, next_norm, dropout_p, seeds[i], cache)
        return normed

    def _norms(self, rows: int, dtype: torch.dtype) -> list[NormParameters]:
        """The parameters of all norms in the order of their use, through an op: in its backward
        one kernel of `fused` sums the gradients of all of them.

        rows: the number of rows of a norm's input. dtype: that of its output.
        """
        norms = [m for m in self.modules() if isinstance(m, LayerNorm)]
        # Weights, and biases if there are any.
        params: list[Tensor] = [p for m in norms for p in m.parameters()]
        found = iter(self.ops.norm_parameters(params, rows, dtype))
        return [(next(found), None if m.bias is None else next(found)) for m in norms]

    def _seeds(self, seed: int | Tensor | None) -> list[list[int | Tensor | None]]:
        """The seeds of every block's dropouts, consecutive numbers from `seed` on.

        If `seed` is a tensor, one addition makes all of them, 16 bytes apart, so that each is
        aligned like a new tensor (Triton compiles another kernel for an address that is not).
        """
        n = len(self.seed_offsets)
        flat: list[int | Tensor | None]
        if isinstance(seed, Tensor):
            flat = list((seed + self.seed_offsets)[:, 0])
        else:
            flat = [None if seed is None else seed + i for i in range(n)]
        return [flat[i : i + DROPOUTS_PER_BLOCK] for i in range(0, n, DROPOUTS_PER_BLOCK)]

    def loss(
        self,
        idx: Tensor,
        targets: Tensor,
        *,
        seed: int | Tensor | None = None,
        loss_scale: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T) after idx (B, T), 0-d float32.

        loss_scale: 0-d, the gradient that `backward` will give the loss. The fused ops compute the
        head's gradients with it, so that small ones do not underflow in float16. For None see
        `irongpt_kernels.eager.linear_cross_entropy`.
        """
        V = self.config.vocab_size
        x, weight = self.hidden(idx, seed).flatten(0, 1), self.wte.weight
        if idx.device.type in PADDED_ON and padded_vocab(V) > V:
            # Only in this matmul: the weight, its gradient, moments and checkpoints have V rows.
            weight = F.pad(weight.to(x.dtype), (0, 0, 0, padded_vocab(V) - V))
        return self.ops.linear_cross_entropy(
            x, weight, targets.flatten(), classes=V, loss_scale=loss_scale
        )


class KVCache:
    """Keys and values of the tokens so far, so that a new token needs only its own: see `decode`.

    k, v: (L, B, H, context, D), of B sequences. `rows` selects those that a model's batch holds.
    """

    def __init__(self, config: GPTConfig, B: int, dtype: torch.dtype, device: torch.device) -> None:
        H, D = config.n_head, config.n_embd // config.n_head
        shape = (config.n_layer, B, H, config.context, D)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.rows: slice | Tensor = slice(None)

    def write(self, layer: int, qkv: Tensor) -> None:
        """qkv: (B, T, 3, H, D), of the sequences `rows`, at positions 0 to T - 1."""
        T = qkv.shape[1]
        _, k, v = qkv.to(self.k.dtype).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        self.k[layer, self.rows, :, :T] = k
        self.v[layer, self.rows, :, :T] = v
