"""The ops that have no gradient: the optimizer's, over a whole model, and those of one token.

    adamw        grad_norm and adamw over all weights: a step of the optimizer
    muon         grad_norm, and muon_momentum and muon_update over the blocks' matrices, by shape;
                 what stands between the two, the iteration, is PyTorch's products for all ops
    embed_tokens, norm_linear, decode_attention, linear_add, sample_tokens
                 of one token for each of B texts that fill the context; norm_linear is the MLP's
                 first product with its GELU, linear_add the second one

Inputs are tensors by name, as those of the other ops. What an op is there to change in place is
among its outputs, and the next call changes it further.

Some of `builtin`'s are eager's: a draw has to be the same by any ops, and the other two are plain
PyTorch anyway. What one would write without such a duty is `textbook`; torch.compile takes that.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from irongpt_kernels.builtin import write_row
from torch import Tensor

from benchmarks.training import matmuls
from irongpt.config import GPTConfig
from irongpt.training import muon

if TYPE_CHECKING:
    from benchmarks.ops.cases import Case

OPTIMIZERS = ("adamw", "muon")
TOKEN = ("embed_tokens", "norm_linear", "decode_attention", "linear_add", "sample_tokens")
OPS = (*OPTIMIZERS, *TOKEN)
AS_EAGER = ("embed_tokens", "linear_add", "sample_tokens")  # in builtin

DECAY = 0.1
SEED = (5 << 32) + 7  # beyond 32 bits
RING = 32  # tokens that a text keeps
TEMPERATURE = 0.8
COLDEST = 1e-6  # no draw of logits that differ
TOP_K = 20  # of a draw, one in which the order of the logits matters

Inputs = dict[str, Tensor]
Sizes = list[tuple[int, ...]]
Function = Callable[[Inputs], tuple[Tensor, ...]]


def config(case: "Case") -> GPTConfig:
    s = case.shape
    return GPTConfig(s.V, n_layer=s.L, n_head=s.H, n_embd=s.H * s.D, context=s.T, dropout=0.0)


def shapes(case: "Case") -> tuple[Sizes, Sizes]:
    """Of the blocks' matrices, and of all other weights."""
    s = case.shape
    C = s.H * s.D
    matrices: Sizes = [*matmuls.matrices(config(case))] * s.L
    return matrices, [(s.V, C), (s.T, C), *[(C,)] * (2 * s.L + 1)]


def numel(sizes: Sizes) -> int:
    return sum(math.prod(size) for size in sizes)


def size(case: "Case") -> str:
    s = case.shape
    C = s.H * s.D
    matrices, rest = shapes(case)
    count = numel(matrices) + (numel(rest) if case.op == "adamw" else 0)
    return {
        "adamw": f"{count / 1e6:.1f} M weights",
        "muon": f"{count / 1e6:.1f} M weights",
        "embed_tokens": f"{s.B}x{C}",
        "norm_linear": f"{s.B}x{C} by {4 * C}x{C}",
        "decode_attention": f"B={s.B} H={s.H} N={s.T} D={s.D}",
        "linear_add": f"{s.B}x{4 * C} by {C}x{4 * C}",
        "sample_tokens": f"{s.B}x{s.V}",
    }[case.op]


def inputs(case: "Case", randn: Callable[..., Tensor], device: torch.device) -> Inputs:
    """randn: of a size and a dtype, the case's own unless given."""
    s = case.shape
    B, C = s.B, s.H * s.D
    wide = torch.float32
    matrices, rest = shapes(case)
    ahead = muon.matmul_dtype(case.dtype, device)

    def state(name: str, n: int, moments: int, dtype: torch.dtype) -> Inputs:
        """n weights in a row, and what an optimizer has of each."""
        made = {f"{name}.params": 0.02 * randn(n, dtype=wide)}
        made[f"{name}.grads"] = (1e-4 * randn(n, dtype=wide)).to(dtype)  # nothing is clipped
        made[f"{name}.moment0"] = 1e-3 * randn(n, dtype=wide)
        if moments > 1:
            made[f"{name}.moment1"] = 1e-6 * randn(n, dtype=wide).square()
        if dtype != wide:
            made[f"{name}.copies"] = made[f"{name}.params"].to(dtype)
        return made

    def step() -> Inputs:
        return {
            "scale": torch.ones((), device=device),
            "growth_tracker": torch.zeros((), dtype=torch.int64, device=device),
            "lr": torch.full((), 0.01, device=device),  # a copy in 16 bits has to show a step
        }

    def adamw() -> Inputs:
        steps = torch.ones(len(matrices) + len(rest), device=device)
        made = state("matrices", numel(matrices), 2, case.dtype)
        return made | state("rest", numel(rest), 2, wide) | step() | {"steps": steps}

    def muons() -> Inputs:
        made = state("matrices", numel(matrices), 1, case.dtype)
        update = (0.02 * randn(numel(matrices), dtype=wide)).to(ahead)
        return made | step() | {"update": update, "steps": torch.ones(1, device=device)}

    def ring() -> Inputs:
        """Texts near the end of their context, as far as there is one, each at another position."""
        position = s.T - 1 - torch.arange(B, device=device) % s.T
        counts = torch.stack([torch.full_like(position, RING), position], 1)
        tokens = torch.arange(B, device=device)[:, None] % s.V  # others read other rows
        return {"tokens": tokens.repeat(1, RING), "counts": counts}

    cache = (B, s.H, s.T, s.D)
    make: dict[str, Callable[[], Inputs]] = {
        "adamw": adamw,
        "muon": muons,
        "embed_tokens": lambda: {
            **ring(), "wte": randn(s.V, C, dtype=wide), "wpe": randn(s.T, C, dtype=wide)
        },
        "norm_linear": lambda: {
            "x": randn(B, C, dtype=wide),
            "weight": 0.02 * randn(4 * C, C),
            "norm_weight": 1 + 0.1 * randn(C, dtype=wide),
        },
        "decode_attention": lambda: {
            "qkv": randn(B, 1, 3, s.H, s.D),
            "cache_k": randn(*cache),
            "cache_v": randn(*cache),
            "position": torch.full((B,), s.T - 1, device=device),
        },
        "linear_add": lambda: {
            "x": randn(B, 4 * C),
            "weight": 0.02 * randn(C, 4 * C),
            "residual": randn(B, C, dtype=wide),
        },
        "sample_tokens": lambda: {
            **ring(),
            # No two are equal, not even in bfloat16: the likeliest is one.
            "logits": torch.linspace(-3, 3, s.V, device=device)[
                randn(B, s.V, dtype=wide).argsort(-1)
            ].to(case.dtype),
            "seed": torch.full((), SEED, device=device),
        },
    }  # fmt: skip
    return make[case.op]()


def call(ops: ModuleType, case: "Case") -> Function:
    """The op by a module of ops. Of inputs: the outputs, and what was changed in place."""
    if case.op == "adamw":
        return lambda x: _adamw(ops, x, *shapes(case))
    if case.op == "muon":
        return lambda x: _muon(ops, x, shapes(case)[0])
    op = getattr(ops, case.op)
    if case.op == "sample_tokens":
        options = dict(temperature=case.p, top_k=TOP_K)
        return lambda x: (op(**x, **options), x["tokens"], x["counts"])[1:]
    if case.op == "decode_attention":
        return lambda x: (op(**x), x["cache_k"], x["cache_v"])
    options = {"gelu": True} if case.op == "norm_linear" else {}
    return lambda x: (op(**x, **options),)


def textbook(case: "Case") -> Function:
    """The op as one would write it; of norm_linear that is builtin's."""
    return {
        "embed_tokens": _embed,
        "decode_attention": _cached_attention,
        "linear_add": lambda x: (x["residual"] + F.linear(x["x"], x["weight"]),),
        "sample_tokens": lambda x: _draw(x, case.p),
    }[case.op]


def _embed(x: Inputs) -> tuple[Tensor, ...]:
    rows = torch.arange(len(x["tokens"]), device=x["tokens"].device)
    last = x["tokens"][rows, (x["counts"][:, 0] - 1) % RING]
    return (F.embedding(last, x["wte"]) + F.embedding(x["counts"][:, 1], x["wpe"]),)


def _cached_attention(x: Inputs) -> tuple[Tensor, ...]:
    """A static cache, of which one row is written and all is attended to behind a mask."""
    cache_k, cache_v = x["cache_k"], x["cache_v"]
    q, k, v = x["qkv"].permute(2, 0, 3, 1, 4)  # (B, H, 1, D)
    seen = write_row(k[:, :, 0], v[:, :, 0], cache_k, cache_v, x["position"])[:, :, None]
    out = F.scaled_dot_product_attention(q, cache_k, cache_v, attn_mask=seen)
    return out.transpose(1, 2), cache_k, cache_v


def _draw(x: Inputs, temperature: float) -> tuple[Tensor, ...]:
    logits, tokens, counts = x["logits"], x["tokens"], x["counts"]
    scores = logits.float() / max(temperature, COLDEST)
    best, which = scores.topk(min(TOP_K, logits.shape[1]))
    # As multinomial draws, but without its look at the probabilities on the host.
    race = best.softmax(-1) / torch.empty_like(best).exponential_()
    drawn = which.gather(1, race.argmax(-1, keepdim=True))
    tokens.scatter_(1, counts[:, :1] % RING, drawn)
    counts += 1
    return tokens, counts


def _parts(flat: Tensor, sizes: Sizes) -> list[Tensor]:
    parts = flat.split([math.prod(size) for size in sizes])
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]


def _unscale(ops: ModuleType, x: Inputs, grads: list[Tensor]) -> Tensor:
    found: Tensor = ops.grad_norm(
        grads, x["scale"], x["growth_tracker"], x["steps"], max_norm=1.0, growth_interval=0
    )
    return found


def _changed(x: Inputs, *names: str) -> tuple[Tensor, ...]:
    """What an optimizer is there to change."""
    own = (*names, "copies", "steps", "growth_tracker")
    return tuple(t for name, t in x.items() if name.split(".")[-1] in own)


def _adamw(ops: ModuleType, x: Inputs, matrices: Sizes, rest: Sizes) -> tuple[Tensor, ...]:
    def both(name: str) -> list[Tensor]:
        return _parts(x[f"matrices.{name}"], matrices) + _parts(x[f"rest.{name}"], rest)

    copies = _parts(x["matrices.copies"], matrices) if "matrices.copies" in x else []
    grads = both("grads")
    stats = _unscale(ops, x, grads)
    ops.adamw(
        both("params"), copies, grads, both("moment0"), both("moment1"), x["steps"], x["lr"],
        stats, beta1=0.9, beta2=0.99,
        weight_decays=[DECAY if len(size) == 2 else 0.0 for size in matrices + rest],
    )  # fmt: skip
    return (stats, *_changed(x, "params", "moment0", "moment1"))


def _muon(ops: ModuleType, x: Inputs, matrices: Sizes) -> tuple[Tensor, ...]:
    grads, params = (_parts(x[f"matrices.{name}"], matrices) for name in ("grads", "params"))
    copies = _parts(x["matrices.copies"], matrices) if "matrices.copies" in x else []
    momentum, update = x["matrices.moment0"], x["update"]
    stats = _unscale(ops, x, grads)
    ahead, begin = [], 0
    for shape in dict.fromkeys(matrices):
        at = [i for i, s in enumerate(matrices) if s == shape]
        end = begin + len(at) * math.prod(shape)
        m, u = (t[begin:end].view(len(at), *shape) for t in (momentum, update))
        ahead.append(
            ops.muon_momentum([grads[i] for i in at], m, stats, beta=0.95, dtype=update.dtype)
        )
        ops.muon_update(
            [params[i] for i in at], [copies[i] for i in at] if copies else [], u, x["lr"],
            stats, scale=muon.RMS * max(shape) ** 0.5, weight_decay=DECAY,
        )  # fmt: skip
        begin = end
    return (stats, *_changed(x, "params", "moment0"), *ahead)


def cost(case: "Case") -> tuple[int, int]:
    """Least bytes across DRAM and FLOPs: by the kernels' own cost functions, and by counting."""
    from irongpt_kernels.fused import decode_linear
    from irongpt_kernels.fused import muon as kernel
    from irongpt_kernels.fused.adamw import adamw_bytes
    from irongpt_kernels.fused.decode_attention import decode_attention_bytes

    s, item = case.shape, case.dtype.itemsize
    B, C = s.B, s.H * s.D
    matrices, rest = (numel(sizes) for sizes in shapes(case))
    copy = item if item < 4 else 0
    found: dict[str, Callable[[], tuple[int, int]]] = {
        "adamw": lambda: (
            adamw_bytes(matrices, item, copy) + adamw_bytes(rest, 4, 0), 0
        ),
        # grad_norm has read the gradients before
        "muon": lambda: (kernel.muon_bytes(matrices, item, item, copy) + matrices * item, 0),
        "embed_tokens": lambda: (3 * B * C * 4, 0),
        "norm_linear": lambda: (decode_linear.row_linear_bytes(4 * C, C, item), 2 * B * 4 * C * C),
        "decode_attention": lambda: (
            decode_attention_bytes(B, s.H, s.T - 1, s.D, item),
            4 * B * s.H * s.T * s.D,
        ),
        "linear_add": lambda: (decode_linear.row_linear_bytes(C, 4 * C, item), 2 * B * 4 * C * C),
        "sample_tokens": lambda: (B * s.V * item, 0),
    }  # fmt: skip
    return found[case.op]()
