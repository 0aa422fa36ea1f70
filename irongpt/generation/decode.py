"""
One token for each of several texts, all of it on the device: the step that a CUDA graph holds.

The model's weights are cast once, to the type of the matrix products, where autocast would cast
them for every token; what is computed from them is the same. On a GPU the step is one graph, of 33
kernels at 6 layers with fused ops and up to 4 texts: 5 a layer, an embedding, the head, the draw.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from irongpt.config import SampleConfig
from irongpt.cuda_graph import Graph
from irongpt.errors import UserError
from irongpt.model import GPT, Block, KVCache

ROOM = 32  # tokens that the device holds until the host reads them
WARMUP = 2  # tokens before the capture: kernels are compiled, libraries have their workspaces
MULTIPLE = 16  # of the windows that a model reads: other lengths would be kernels of their own


class Matrix(NamedTuple):
    """A linear layer, or a norm, as the ops take it."""

    weight: Tensor
    bias: Tensor | None


class Decoder:
    """`texts` texts in the making. After `read`, each step draws the next token of each."""

    def __init__(
        self,
        model: GPT,
        texts: int,
        config: SampleConfig,
        dtype: torch.dtype | None = None,
        graph: bool = True,
    ) -> None:
        """model: in evaluation mode. dtype: of the matrix products; its weights' own unless given.

        graph: whether a GPU replays a CUDA graph.
        """
        self.model, self.config = model, config
        device = model.wte.weight.device
        self.dtype = dtype or model.wte.weight.dtype
        self.cache = KVCache(model.config, texts, self.dtype, device)
        self.tokens = torch.zeros(texts, ROOM, dtype=torch.int64, device=device)  # a ring
        # Tokens drawn, and the position of the last one: of a text, in one row.
        self.counts = torch.zeros(texts, 2, dtype=torch.int64, device=device)
        self.seed = torch.full((), config.seed, dtype=torch.int64, device=device)
        self.drawn, self.positions = 0, [0] * texts  # the same, as the host knows it
        self.blocks = [self._matrices(b) for b in cast(Sequence[Block], model.blocks)]
        self.last_norm = Matrix(model.ln_f.weight, model.ln_f.bias)
        self.head = model.wte.weight.to(self.dtype)
        captured = graph and device.type == "cuda"
        self.run: Callable[[], None] = Graph(self.step, device, WARMUP) if captured else self.step

    def _matrices(self, block: Block) -> tuple[Matrix, ...]:
        """In the order of their use."""
        attention, mlp = block.attn, block.mlp
        fc = Matrix(mlp.fc.weight.to(self.dtype), mlp.fc.bias)  # GELU adds this bias, in float32
        return (
            Matrix(block.ln_1.weight, block.ln_1.bias),
            self._cast(attention.qkv),
            self._cast(attention.proj),
            Matrix(block.ln_2.weight, block.ln_2.bias),
            fc,
            self._cast(mlp.proj),
        )

    def _cast(self, linear: nn.Linear) -> Matrix:
        bias = cast(Tensor | None, linear.bias)
        return Matrix(linear.weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def read(self, windows: dict[int, list[int]]) -> None:
        """Fills the cache: windows, by text, are what its next token will see.

        All but a window's last token, which the next step reads, go through the model at once. They
        are filled up at their ends, with positions that are written again before they are seen.
        """
        device, config = self.tokens.device, self.model.config
        for text, window in windows.items():
            self.positions[text] = len(window) - 1
        counts = [[self.drawn, position] for position in self.positions]
        self.counts.copy_(torch.tensor(counts))
        if self.drawn == 0:
            self.tokens[:, -1] = torch.tensor([w[-1] for w in windows.values()], device=device)
        longest = max(len(window) - 1 for window in windows.values())
        if longest == 0:
            return
        T = min(config.context, -(-longest // MULTIPLE) * MULTIPLE)
        idx = torch.tensor([w[:-1] + [0] * (T + 1 - len(w)) for w in windows.values()])
        rows = slice(None) if len(windows) == len(counts) else torch.tensor(list(windows))
        self.cache.rows = rows if isinstance(rows, slice) else rows.to(device)
        lower = self.dtype != self.model.wte.weight.dtype
        with torch.autocast(device.type, self.dtype if lower else None, enabled=lower):
            self.model(idx.to(device), cache=self.cache)

    def step(self) -> None:
        """Each text's next token, from its last one, into `tokens`. The host looks at nothing."""
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
            self._draw(ops.norm_linear(x, self.head, *self.last_norm))

    def _draw(self, logits: Tensor) -> None:
        """logits: (B, V)."""
        how = self.config
        self.model.ops.sample_tokens(
            logits, self.tokens, self.counts, self.seed,
            temperature=how.temperature, top_k=how.top_k, top_p=how.top_p,
        )  # fmt: skip

    def write(self, n: int) -> Iterator[list[int]]:
        """The next n tokens of all texts, one at a time. n: up to ROOM.

        Raises UserError where logits were not finite.
        """
        for _ in range(n):
            self.run()
        ring = self.tokens.tolist()  # here the host waits for the device
        first, self.drawn = self.drawn, self.drawn + n
        self.positions = [position + n for position in self.positions]
        for number in range(first, self.drawn):
            drawn = [row[number % ROOM] for row in ring]
            if min(drawn) < 0:
                raise UserError("the model's logits are not finite: its weights are of no use")
            yield drawn
