"""
The decoding step: one token for each sequence of a batch, entirely on the device.

The model's weights are cast once, to the dtype of the matmuls, where autocast would cast them for
every token; the results are the same. On a GPU the step is one CUDA graph. With fused ops, 6 layers
and up to 4 sequences it has 33 kernels: 5 per layer, an embedding, the head and the sampling.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from irongpt_kernels.op_inputs import RING_SIZE
from torch import Tensor, nn

from irongpt.config import SampleConfig
from irongpt.cuda_graph import Graph
from irongpt.errors import UserError
from irongpt.model import GPT, Block, KVCache

WARMUP = 2  # tokens before the capture, so that kernels are compiled and workspaces allocated
PREFILL_MULTIPLE = 16  # the prefill is padded to a multiple, so that Triton compiles fewer kernels


def matmuls_in(dtype: torch.dtype | None, model: GPT) -> torch.autocast:
    """Matmuls in `dtype`, by default that of the weights, also where autocast is on already."""
    weight = model.wte.weight
    lower = dtype not in (None, weight.dtype)
    return torch.autocast(weight.device.type, dtype if lower else None, enabled=lower)


class Affine(NamedTuple):
    """The parameters of a linear layer or a norm."""

    weight: Tensor
    bias: Tensor | None


class Decoder:
    """Generates a batch of B sequences. After `prefill`, each step samples their next tokens."""

    def __init__(
        self,
        model: GPT,
        B: int,
        config: SampleConfig,
        dtype: torch.dtype | None = None,
        graph: bool = True,
    ) -> None:
        """model: in evaluation mode. dtype: that of the matmuls, by default the weights'.

        graph: whether a GPU replays a CUDA graph.
        """
        self.model, self.config = model, config
        device = model.wte.weight.device
        self.dtype = dtype or model.wte.weight.dtype
        self.cache = KVCache(model.config, B, self.dtype, device)
        self.tokens = torch.zeros(B, RING_SIZE, dtype=torch.int64, device=device)  # a ring buffer
        # Per sequence: the number of sampled tokens, and the position of the last one.
        self.counts = torch.zeros(B, 2, dtype=torch.int64, device=device)
        self.seed = torch.full((), config.seed, dtype=torch.int64, device=device)
        self.sampled = 0  # the host's copy of the first count
        self.blocks = [self._block_parameters(b) for b in cast(Sequence[Block], model.blocks)]
        self.last_norm = Affine(model.ln_f.weight, model.ln_f.bias)
        self.head = model.wte.weight.to(self.dtype)
        captured = graph and device.type == "cuda"
        self.graph = Graph(self.step, device, WARMUP) if captured else None

    def run(self) -> None:
        """A step, or the replay of one."""
        step = self.graph or self.step
        step()

    def _block_parameters(self, block: Block) -> tuple[Affine, ...]:
        """The parameters of a block in the order of their use."""
        attention, mlp = block.attn, block.mlp
        fc = Affine(mlp.fc.weight.to(self.dtype), mlp.fc.bias)  # GELU adds this bias, in float32
        return (
            Affine(block.ln_1.weight, block.ln_1.bias),
            self._cast(attention.qkv),
            self._cast(attention.proj),
            Affine(block.ln_2.weight, block.ln_2.bias),
            fc,
            self._cast(mlp.proj),
        )

    def _cast(self, linear: nn.Linear) -> Affine:
        bias = cast(Tensor | None, linear.bias)
        return Affine(linear.weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def prefill(self, windows: Sequence[list[int]], rows: Sequence[int]) -> None:
        """Fills the cache. windows: for each sequence, the tokens that precede its next token.

        rows: the sequences whose tokens are not in the cache. All but the last token, which the
        next step reads, go through the model at once. They are padded at their ends; these
        positions are overwritten before they are used.
        """
        device, prompts = self.tokens.device, [windows[i][:-1] for i in rows]
        self.counts.copy_(torch.tensor([[self.sampled, len(window) - 1] for window in windows]))
        if self.sampled == 0:
            self.tokens[:, -1] = torch.tensor([window[-1] for window in windows], device=device)
        longest = max(map(len, prompts))
        if longest == 0:
            return
        T = min(self.model.config.context, -(-longest // PREFILL_MULTIPLE) * PREFILL_MULTIPLE)
        idx = torch.tensor([prompt + [0] * (T - len(prompt)) for prompt in prompts], device=device)
        everyone = len(rows) == len(windows)
        self.cache.rows = slice(None) if everyone else torch.tensor(rows, device=device)
        with matmuls_in(self.dtype, self.model):
            self.model.hidden(idx, cache=self.cache)  # no logits are needed

    def step(self) -> None:
        """Samples the next token of each sequence into `tokens`, without the host waiting."""
        ops, config, cache = self.model.ops, self.model.config, self.cache
        B, C, H = len(self.tokens), config.n_embd, config.n_head
        with torch.autocast(self.tokens.device.type, enabled=False):
            wte, wpe = self.model.wte.weight, self.model.wpe.weight
            x = ops.embed_tokens(self.tokens, self.counts, wte, wpe)  # (B, C)
            for layer, (ln_1, qkv, proj, ln_2, fc, fc_proj) in enumerate(self.blocks):
                y = ops.norm_linear(x, qkv.weight, *ln_1, qkv.bias).view(B, 1, 3, H, C // H)
                y = ops.decode_attention(y, cache.k[layer], cache.v[layer], self.counts[:, 1])
                x = ops.linear_add(y.reshape(B, C), proj.weight, x, proj.bias)
                y = ops.norm_linear(x, fc.weight, *ln_2, fc.bias, gelu=True)
                x = ops.linear_add(y, fc_proj.weight, x, fc_proj.bias)
            self._sample(ops.norm_linear(x, self.head, *self.last_norm))

    def _sample(self, logits: Tensor) -> None:
        """logits: (B, V)."""
        config = self.config
        self.model.ops.sample_tokens(
            logits, self.tokens, self.counts, self.seed,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        )  # fmt: skip

    def generate(self, n: int) -> Iterator[list[int]]:
        """Yields the next n tokens of every sequence, one step at a time. n: up to RING_SIZE.

        Raises UserError if logits were not finite.
        """
        for _ in range(n):
            self.run()
        ring = self.tokens.tolist()  # here the host waits for the device
        first, self.sampled = self.sampled, self.sampled + n
        for number in range(first, self.sampled):
            tokens = [row[number % RING_SIZE] for row in ring]
            if min(tokens) < 0:
                raise UserError("the model's logits are not finite: its weights are unusable")
            yield tokens
