"""The ops that have no gradient: the optimizer's, over a whole model, and those of one token.

    adamw        unscale and adamw over all weights: a step of the optimizer
    muon         muon_momentum and muon_update over the blocks' matrices, by shape; what stands
                 between the two, Muon's iteration, is PyTorch's products for all of the ops
    embed_tokens, norm_linear, cached_attention, linear_add, draw_tokens
                 of one token for each of B texts that fill the context; norm_linear is the MLP's
                 first product with its GELU, linear_add the second one

Inputs are tensors by name, as those of the other ops. What an op changes in place is among its
outputs, and the next call changes it further.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.workloads import Case

OPTIMIZERS = ("adamw", "muon")
TOKEN = ("embed_tokens", "norm_linear", "cached_attention", "linear_add", "draw_tokens")
OPS = (*OPTIMIZERS, *TOKEN)

DECAY = 0.1
SEED = (5 << 32) + 7  # beyond 32 bits
TOP_K = 20  # of a draw, one in which the order of the logits matters

Inputs = dict[str, Tensor]


def shapes(case: "Case") -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Of the blocks' matrices, and of all other weights."""
    s = case.shape
    C = s.H * s.D
    matrices: list[tuple[int, ...]] = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]
    return matrices * s.L, [(s.V, C), (s.T, C), *[(C,)] * (2 * s.L + 1)]


def numel(sizes: list[tuple[int, ...]]) -> int:
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
        "cached_attention": f"B={s.B} H={s.H} N={s.T} D={s.D}",
        "linear_add": f"{s.B}x{4 * C} by {C}x{4 * C}",
        "draw_tokens": f"{s.B}x{s.V}",
    }[case.op]


def inputs(case: "Case", randn: Callable[..., Tensor], device: torch.device) -> Inputs:
    """randn: of a size and a dtype, the case's own unless given."""
    s = case.shape
    B, C = s.B, s.H * s.D
    wide = torch.float32
    matrices, rest = shapes(case)
    narrow = case.dtype != wide

    def state(name: str, n: int, moments: int, dtype: torch.dtype) -> Inputs:
        """n weights in a row, and what an optimizer has of each."""
        made = {f"{name}.params": 0.02 * randn(n, dtype=wide)}
        made[f"{name}.grads"] = (1e-3 * randn(n, dtype=wide)).to(dtype)
        made[f"{name}.moment0"] = 1e-3 * randn(n, dtype=wide)
        if moments > 1:
            made[f"{name}.moment1"] = 1e-6 * randn(n, dtype=wide).square()
        if dtype != wide:
            made[f"{name}.copies"] = made[f"{name}.params"].to(dtype)
        return made

    def step() -> Inputs:
        return {
            "scale": torch.ones((), device=device),
            "good_steps": torch.zeros((), dtype=torch.int64, device=device),
            "lr": torch.full((), 1e-3, device=device),
        }

    def adamw() -> Inputs:
        steps = torch.ones(len(matrices) + len(rest), device=device)
        made = state("matrices", numel(matrices), 2, case.dtype)
        return made | state("rest", numel(rest), 2, wide) | step() | {"steps": steps}

    def muon() -> Inputs:
        made = state("matrices", numel(matrices), 1, case.dtype)
        update = (0.02 * randn(numel(matrices), dtype=wide)).to(torch.float16 if narrow else wide)
        return made | step() | {"update": update, "steps": torch.ones(1, device=device)}

    def ring() -> Inputs:
        """Every text has filled its context, and the ring of its last 32 tokens."""
        counts = torch.tensor([[32, s.T - 1]], device=device).repeat(B, 1)
        return {"tokens": torch.zeros(B, 32, dtype=torch.int64, device=device), "counts": counts}

    cache = (B, s.H, s.T, s.D)
    make: dict[str, Callable[[], Inputs]] = {
        "adamw": adamw,
        "muon": muon,
        "embed_tokens": lambda: {
            **ring(), "wte": randn(s.V, C, dtype=wide), "wpe": randn(s.T, C, dtype=wide)
        },
        "norm_linear": lambda: {
            "x": randn(B, C, dtype=wide),
            "weight": 0.02 * randn(4 * C, C),
            "norm_weight": 1 + 0.1 * randn(C, dtype=wide),
        },
        "cached_attention": lambda: {
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
        "draw_tokens": lambda: {
            **ring(),
            "logits": randn(B, s.V),
            "seed": torch.full((), SEED, device=device),
        },
    }  # fmt: skip
    return make[case.op]()


def call(ops: ModuleType, case: "Case") -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The op by a module of ops. Of inputs: the outputs, and what was changed in place."""
    if case.op == "adamw":
        return lambda x: _adamw(ops, x, *shapes(case))
    if case.op == "muon":
        return lambda x: _muon(ops, x, shapes(case)[0])
    op = getattr(ops, case.op)
    if case.op == "draw_tokens":

        def draw(x: Inputs) -> tuple[Tensor, ...]:
            op(**x, temperature=0.8, top_k=TOP_K)
            return (x["tokens"],)

        return draw
    if case.op == "cached_attention":
        return lambda x: (op(**x), x["cache_k"], x["cache_v"])
    options = {"gelu": True} if case.op == "norm_linear" else {}
    return lambda x: (op(**x, **options),)


def _parts(flat: Tensor, sizes: list[tuple[int, ...]]) -> list[Tensor]:
    parts = flat.split([math.prod(size) for size in sizes])
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]


def _unscale(ops: ModuleType, x: Inputs, grads: list[Tensor]) -> Tensor:
    found: Tensor = ops.unscale(
        grads, x["scale"], x["good_steps"], x["steps"], max_norm=1.0, calm=0
    )
    return found


def _adamw(
    ops: ModuleType, x: Inputs, matrices: list[tuple[int, ...]], rest: list[tuple[int, ...]]
) -> tuple[Tensor, ...]:
    def both(name: str) -> list[Tensor]:
        return [
            *_parts(x[f"matrices.{name}"], matrices), *_parts(x[f"rest.{name}"], rest)
        ]  # fmt: skip

    copies = _parts(x["matrices.copies"], matrices) if "matrices.copies" in x else []
    grads = both("grads")
    unscaled = _unscale(ops, x, grads)
    ops.adamw(
        both("params"), copies, grads, both("moment0"), both("moment1"), x["steps"], x["lr"],
        unscaled, beta1=0.9, beta2=0.99,
        weight_decays=[DECAY if len(size) == 2 else 0.0 for size in matrices + rest],
    )  # fmt: skip
    return tuple(t for name, t in x.items() if name.endswith(("params", "moment0", "moment1")))


def _muon(ops: ModuleType, x: Inputs, matrices: list[tuple[int, ...]]) -> tuple[Tensor, ...]:
    grads, params = (_parts(x[f"matrices.{name}"], matrices) for name in ("grads", "params"))
    copies = _parts(x["matrices.copies"], matrices) if "matrices.copies" in x else []
    momentum, update = (x["matrices.moment0"], x["update"])
    unscaled = _unscale(ops, x, grads)
    ahead, begin = [], 0
    for shape in dict.fromkeys(matrices):
        at = [i for i, s in enumerate(matrices) if s == shape]
        end = begin + len(at) * math.prod(shape)
        m, u = (t[begin:end].view(len(at), *shape) for t in (momentum, update))
        ahead.append(
            ops.muon_momentum([grads[i] for i in at], m, unscaled, beta=0.95, dtype=update.dtype)
        )
        ops.muon_update(
            [params[i] for i in at], [copies[i] for i in at] if copies else [], u, x["lr"],
            unscaled, scale=0.2 * max(shape) ** 0.5, weight_decay=DECAY,
        )  # fmt: skip
        begin = end
    return (x["matrices.params"], momentum, *ahead)


def least_bytes(case: "Case") -> int:
    """Across DRAM, by the kernels' own cost functions."""
    from irongpt_kernels import adamw, cached_attention, muon, row_linear

    s, item = case.shape, case.dtype.itemsize
    B, C = s.B, s.H * s.D
    matrices, rest = (numel(sizes) for sizes in shapes(case))
    copy = item if item < 4 else 0
    moved: dict[str, Callable[[], int]] = {
        "adamw": lambda: adamw.adamw_bytes(matrices, item, copy) + adamw.adamw_bytes(rest, 4, 0),
        # unscale has read the gradients before
        "muon": lambda: muon.muon_bytes(matrices, item, item, copy) + matrices * item,
        "embed_tokens": lambda: 3 * B * C * 4,
        "norm_linear": lambda: row_linear.row_linear_bytes(4 * C, C, item),
        "cached_attention": lambda: cached_attention.cached_attention_bytes(
            B, s.H, s.T - 1, s.D, item
        ),
        "linear_add": lambda: row_linear.row_linear_bytes(C, 4 * C, item),
        "draw_tokens": lambda: B * s.V * item,
    }
    return moved[case.op]()
