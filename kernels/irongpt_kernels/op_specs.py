"""One entry (`OpSpec`) per op: inputs at a shape, call, outputs, least bytes and FLOPs.

`irongpt compare`, the benchmarks, `aot` and the tests iterate over `SPECS`: for them a new op needs
only an entry here. Other shapes in `aot.shapes` and tiles for `irongpt tune` are optional.

The entry `adamw` calls grad_norm and adamw for all weights of a model. `muon` calls grad_norm,
muon_momentum and muon_update for the blocks' matrices, without the matmuls between the last two,
which make the update orthogonal. `sum_shards` replaces grad_norm if a step is cut into shards. The
ops of a decoding step work on one token for each of B sequences, near the end of the context.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from irongpt_kernels import op_costs
from irongpt_kernels.op_costs import Cost, numel, optimizer_bytes
from irongpt_kernels.op_inputs import RING_SIZE, TOP_K, Input, Shape, Sizes, Tensors


@dataclass(frozen=True)
class OpSpec:
    """The description of an op.

    inputs(shape): each `Input` by name. size(shape): the shape as text. outputs: result names.
    kind: "layer" for an op with a gradient, "optimizer", "token" for an op of a decoding step.
    cost(shape, itemsize, stream_itemsize, backward): the least bytes and FLOPs. The itemsizes are
        those of the compute dtype and of the residual stream.
    options(shape, p, seed): arguments that are not tensors; p is dropout, or the temperature.
    changes: inputs that `run` updates in place, by the last part of their names, after the dot.
    functions: the functions of `Ops` that this entry describes, by default only `name`.
    call(ops, shape, inputs, **options): runs the entry; by default the function `name`.
    scores: whether the op has a T x T matrix per head. sweeps: sizes that the benchmarks vary.
    full_rows: an entry of the same op with rows of V elements, as in the output layer.
    """

    name: str
    inputs: Callable[[Any], dict[str, Input]]
    cost: Callable[[Any, int, int, bool], Cost]
    size: Callable[[Any], str]
    kind: str = "layer"
    outputs: tuple[str, ...] = ("out",)
    options: Callable[[Any, float, Any], dict[str, Any]] = lambda s, p, seed: {}
    dropout: bool = False
    changes: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    call: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    scores: bool = False
    sweeps: tuple[str, ...] = ("batch",)
    full_rows: "OpSpec | None" = None

    @property
    def names(self) -> tuple[str, ...]:
        """The functions of `Ops` that this entry describes."""
        return self.functions or (self.name,)

    @property
    def differentiable(self) -> bool:
        return self.kind == "layer"

    def for_sweep(self, sweep: str) -> "OpSpec | None":
        """The entry that lists the sweep: this one or `full_rows`; None if neither does."""
        return next((s for s in (self, self.full_rows) if s and sweep in s.sweeps), None)

    def float32_only(self) -> bool:
        """Whether no tensor has the compute dtype, so that the op is the same in any precision."""
        return all(x.role != "compute" for x in self.inputs(Shape()).values())

    def run(self, ops: Any, shape: Shape, x: Tensors, **options: Any) -> tuple[Tensor, ...]:
        """The outputs of the op as `ops` computes it, then the inputs that it changes in place."""
        if self.call is not None:
            out = self.call(ops, shape, x, **options)
        else:
            out = getattr(ops, self.name)(**x, **options)
        found = () if out is None else out if isinstance(out, tuple) else (out,)
        return (*found, *(x[name] for name in self.changed(x)))

    def changed(self, x: Tensors) -> list[str]:
        """The names of the inputs that the op updates in place."""
        return [name for name in x if name.split(".")[-1] in self.changes]


def _dropout(s: Shape, p: float, seed: Any) -> dict[str, Any]:
    return dict(dropout_p=p, seed=seed)


def _norm_inputs(s: Shape) -> dict[str, Input]:
    C = (s.width,)
    return dict(weight=Input(C, "weight", 0.1, 1.0), bias=Input(C, "weight", optional=True))


def _embed_norm(ops: Any, s: Shape, x: Tensors) -> tuple[Tensor, ...]:
    """Prepares the norm's parameters first, as a model does."""
    names = [name for name in ("weight", "bias") if name in x]
    dtype = x["wte"].dtype
    found = ops.norm_parameters([x[name] for name in names], s.B * s.T, dtype)
    out: tuple[Tensor, ...] = ops.embed_layer_norm(
        x["wte"], x["wpe"], x["idx"], **dict(zip(names, found, strict=True))
    )
    return out


LAYERS = (
    OpSpec(
        "causal_attention",
        lambda s: dict.fromkeys("qkv", Input((s.B, s.H, s.T, s.D))),
        op_costs.attention_cost,
        lambda s: f"B={s.B} H={s.H} T={s.T} D={s.D}",
        options=_dropout,
        dropout=True,
        scores=True,
        sweeps=("T", "D", "batch"),
    ),
    OpSpec(
        "causal_attention_packed",
        lambda s: dict(qkv=Input((s.B, s.T, 3, s.H, s.D))),
        op_costs.attention_cost,
        lambda s: f"B={s.B} H={s.H} T={s.T} D={s.D}",
        options=_dropout,
        dropout=True,
        scores=True,
        sweeps=("T", "batch"),
    ),
    OpSpec(
        "layer_norm",
        lambda s: dict(x=Input((s.rows, s.width), "stream")) | _norm_inputs(s),
        op_costs.norm_cost,
        lambda s: f"{s.rows}x{s.width}",
        sweeps=("batch", "width"),
    ),
    OpSpec(
        "softmax",
        lambda s: dict(x=Input((s.B, s.H, s.T, s.T))),
        op_costs.softmax_cost,
        lambda s: f"{s.B}x{s.H}x{s.T}x{s.T}",
        options=lambda s, p, seed: dict(scale=s.D**-0.5, causal=True),
        scores=True,
        sweeps=("T", "batch"),
        full_rows=OpSpec(
            "softmax",
            lambda s: dict(x=Input((s.rows, s.V))),
            lambda s, item, stream, backward: Cost((3 if backward else 2) * s.rows * s.V * item),
            lambda s: f"{s.rows}x{s.V}",
            options=lambda s, p, seed: dict(scale=s.D**-0.5),
        ),
    ),
    OpSpec(
        "cross_entropy",
        lambda s: dict(
            logits=Input((s.rows, s.V)),
            targets=Input((s.rows,), "integer", below=s.V, ignorable=True),
        ),
        op_costs.cross_entropy_cost,
        lambda s: f"{s.rows}x{s.V}",
        sweeps=("batch", "V"),
    ),
    OpSpec(
        "linear_cross_entropy",
        lambda s: dict(
            x=Input((s.rows, s.width)),
            weight=Input((s.V, s.width), std=0.05),  # logits of about 1 at iron's width
            targets=Input((s.rows,), "integer", below=s.V),
        ),
        op_costs.linear_cross_entropy_cost,
        lambda s: f"{s.rows}x{s.width} by {s.V}x{s.width}",
        sweeps=("batch", "V"),
    ),
    OpSpec(
        "gelu",
        lambda s: dict(
            x=Input((s.rows, 4 * s.width)), bias=Input((4 * s.width,), "weight", optional=True)
        ),
        op_costs.gelu_cost,
        lambda s: f"{s.rows}x{4 * s.width}",
        sweeps=("batch", "width"),
    ),
    OpSpec(
        "dropout_add_layer_norm",
        lambda s: dict(
            branch=Input((s.rows, s.width)),
            residual=Input((s.rows, s.width), "stream"),
            **_norm_inputs(s),
        ),
        op_costs.add_norm_cost,
        lambda s: f"{s.rows}x{s.width}",
        outputs=("total", "normed"),
        options=_dropout,
        dropout=True,
        sweeps=("batch", "width"),
    ),
    OpSpec(
        "embed_layer_norm",
        lambda s: dict(
            wte=Input((s.V, s.width), "weight"),
            wpe=Input((s.T, s.width), "weight"),
            idx=Input((s.B, s.T), "integer", below=s.V),
            **_norm_inputs(s),
        ),
        op_costs.embed_norm_cost,
        lambda s: f"{s.B}x{s.T}x{s.width} of {s.V}",
        outputs=("x", "normed"),
        functions=("norm_parameters", "embed_layer_norm"),
        call=_embed_norm,
        sweeps=("batch", "width", "V"),
    ),
)

WEIGHT_DECAY = 0.1
SHARDS = 2  # as in training on two GPUs


def _state(name: str, n: int, moments: int, role: str) -> dict[str, Input]:
    """n weights as one flat tensor, with gradients, moments and copies."""
    found = {"params": Input((n,), "weight", std=0.02)}
    found["grads"] = Input((n,), role, values=lambda x: 1e-4 * x)  # so small that none is clipped
    found["moment0"] = Input((n,), "weight", std=1e-3)
    if moments > 1:
        found["moment1"] = Input((n,), "weight", values=lambda x: 1e-6 * x.square())
    if role == "compute":
        found["copies"] = Input((n,), copy_of=f"{name}.params")
    return {f"{name}.{part}": one for part, one in found.items()}


def _step(n: int) -> dict[str, Input]:
    return dict(
        scale=Input((), "weight", fill=1),
        growth_tracker=Input((), "integer", fill=0),
        lr=Input((), "weight", fill=0.01),  # large enough that a 16-bit copy changes
        steps=Input((n,), "weight", fill=1),
    )


def _adamw_inputs(s: Shape) -> dict[str, Input]:
    matrices, others = s.matrices(), s.other_weights()
    made = _state("matrices", numel(matrices), 2, "compute")
    return made | _state("rest", numel(others), 2, "weight") | _step(len(matrices) + len(others))


def _muon_inputs(s: Shape) -> dict[str, Input]:
    n = numel(s.matrices())
    return {
        **_state("matrices", n, 1, "compute"),
        "update": Input((n,), "update", values=lambda x: 0.02 * x),
        **_step(1),
    }


def _parts(flat: Tensor, sizes: Sizes) -> list[Tensor]:
    parts = flat.split([math.prod(size) for size in sizes])
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]


def _grad_norm(ops: Any, x: Tensors, grads: list[Tensor], growth_interval: int) -> Any:
    numbers = x["scale"], x["growth_tracker"], x["steps"]
    return ops.grad_norm(grads, *numbers, max_norm=1.0, growth_interval=growth_interval)


def _adamw(ops: Any, s: Shape, x: Tensors, growth_interval: int = 0) -> Tensor:
    matrices, others = s.matrices(), s.other_weights()

    def every(name: str) -> list[Tensor]:
        return _parts(x[f"matrices.{name}"], matrices) + _parts(x[f"rest.{name}"], others)

    copies = _parts(x["matrices.copies"], matrices) if "matrices.copies" in x else []
    grads = every("grads")
    stats = _grad_norm(ops, x, grads, growth_interval)
    state = every("params"), copies, grads, every("moment0"), every("moment1")
    decays = [WEIGHT_DECAY if len(size) == 2 else 0.0 for size in matrices + others]
    betas = dict(beta1=0.875, beta2=0.9921875)  # exact in float32, which PyTorch's CUDA kernel uses
    ops.adamw(*state, x["steps"], x["lr"], stats, **betas, weight_decays=decays)
    return stats


def _muon(ops: Any, s: Shape, x: Tensors, growth_interval: int = 0) -> tuple[Tensor, ...]:
    """Matrices of one size are updated together."""
    matrices = s.matrices()
    grads, params = (_parts(x[f"matrices.{name}"], matrices) for name in ("grads", "params"))
    copies = _parts(x["matrices.copies"], matrices) if "matrices.copies" in x else []
    momentum, update = x["matrices.moment0"], x["update"]
    stats = _grad_norm(ops, x, grads, growth_interval)
    normalized, begin = [], 0
    for size in dict.fromkeys(matrices):
        at = [i for i, other in enumerate(matrices) if other == size]
        end = begin + len(at) * math.prod(size)
        m, u = (t[begin:end].view(len(at), *size) for t in (momentum, update))
        some = [grads[i] for i in at]
        normalized.append(ops.muon_momentum(some, m, stats, beta=0.95, dtype=u.dtype))
        some, some_copies = [params[i] for i in at], [copies[i] for i in at] if copies else []
        options = dict(scale=0.2 * max(size) ** 0.5, weight_decay=WEIGHT_DECAY)
        ops.muon_update(some, some_copies, u, x["lr"], stats, **options)
        begin = end
    return (stats, *normalized)


STEP_STATE = ("copies", "steps", "growth_tracker")
OPTIMIZERS = (
    OpSpec(
        "adamw",
        _adamw_inputs,
        lambda s, item, stream, backward: Cost(
            optimizer_bytes("adamw", numel(s.matrices()), numel(s.other_weights()), item)
        ),
        lambda s: f"{numel(s.matrices() + s.other_weights()) / 1e6:.1f} M weights",
        kind="optimizer",
        outputs=("stats",),
        functions=("grad_norm", "adamw"),
        call=_adamw,
        changes=("params", "moment0", "moment1", *STEP_STATE),
        sweeps=(),
    ),
    OpSpec(
        "muon",
        _muon_inputs,
        lambda s, item, *_: Cost(optimizer_bytes("muon", numel(s.matrices()), 0, item)),
        lambda s: f"{numel(s.matrices()) / 1e6:.1f} M weights",
        kind="optimizer",
        outputs=("stats", *(f"normalized {name}" for name in ("qkv", "proj", "fc", "fc_proj"))),
        functions=("muon_momentum", "muon_update"),
        call=_muon,
        changes=("params", "moment0", *STEP_STATE),
        sweeps=(),
    ),
    OpSpec(
        "sum_shards",
        lambda s: dict(
            shards=Input((SHARDS, numel(s.matrices() + s.other_weights())), std=1e-4),
            scale=Input((), "weight", fill=1),
            growth_tracker=Input((), "integer", fill=0),
            state_steps=Input((1,), "weight", fill=1),
        ),
        lambda s, item, *_: Cost(numel(s.matrices() + s.other_weights()) * (SHARDS * item + 4)),
        lambda s: f"{SHARDS} x {numel(s.matrices() + s.other_weights()) / 1e6:.1f} M weights",
        kind="optimizer",
        outputs=("total", "stats"),
        options=lambda s, p, seed: dict(max_norm=1.0),
        changes=("scale", "growth_tracker", "state_steps"),
        sweeps=(),
    ),
)


def _ring(s: Shape) -> dict[str, Input]:
    """Sequences near the end of the context. Their positions and tokens differ, and repeat only
    if there are more sequences than positions or tokens."""

    def tokens(x: Tensor) -> Tensor:
        return (torch.arange(len(x), device=x.device)[:, None] % s.V).repeat(1, RING_SIZE)

    def counts(x: Tensor) -> Tensor:
        position = s.T - 1 - torch.arange(len(x), device=x.device) % s.T
        return torch.stack([torch.full_like(position, RING_SIZE), position], 1)

    return dict(
        tokens=Input((s.B, RING_SIZE), "integer", values=tokens),
        counts=Input((s.B, 2), "integer", values=counts),
    )


def _logits(x: Tensor) -> Tensor:
    """Rows of permuted, evenly spaced values. In bfloat16 some are equal from about V = 400 on."""
    return torch.linspace(-3, 3, x.shape[1], device=x.device)[x.argsort(-1)]


def _norm_linear_inputs(s: Shape, rows: int) -> dict[str, Input]:
    """Inputs of `norm_linear` for a weight with this number of rows."""
    norm = {f"norm_{name}": one for name, one in _norm_inputs(s).items()}
    x, weight = Input((s.B, s.width), "stream"), Input((rows, s.width), std=0.02)
    return dict(x=x, weight=weight) | norm


TOKEN = (
    OpSpec(
        "embed_tokens",
        lambda s: (
            _ring(s)
            | dict(wte=Input((s.V, s.width), "weight"), wpe=Input((s.T, s.width), "weight"))
        ),
        lambda s, item, stream, backward: Cost(3 * s.B * s.width * stream),
        lambda s: f"{s.B}x{s.width} of {s.V}",
        kind="token",
        sweeps=("batch", "V"),
    ),
    OpSpec(  # the MLP's first matmul and its GELU
        "norm_linear",
        lambda s: (
            _norm_linear_inputs(s, 4 * s.width)
            | dict(bias=Input((4 * s.width,), "weight", optional=True))
        ),
        lambda s, item, stream, backward: Cost(4 * s.width**2 * item, 2 * s.B * 4 * s.width**2),
        lambda s: f"{s.B}x{s.width} by {4 * s.width}x{s.width}",
        kind="token",
        options=lambda s, p, seed: dict(gelu=True),
        full_rows=OpSpec(
            "norm_linear",
            lambda s: _norm_linear_inputs(s, s.V),
            lambda s, item, stream, backward: Cost(s.V * s.width * item, 2 * s.B * s.V * s.width),
            lambda s: f"{s.B}x{s.width} by {s.V}x{s.width}",
            kind="token",
            sweeps=("V",),
        ),
    ),
    OpSpec(
        "decode_attention",
        lambda s: dict(
            qkv=Input((s.B, 1, 3, s.H, s.D)),
            cache_k=Input((s.B, s.H, s.T, s.D)),
            cache_v=Input((s.B, s.H, s.T, s.D)),
            position=Input(  # a column of `counts`, as in generation
                (s.B,), "integer", values=lambda x: x.new_full((len(x), 2), s.T - 1)[:, 1]
            ),
        ),
        # Read: the keys and values of earlier positions, and q, k, v. Written: k, v and out.
        lambda s, item, stream, backward: Cost(
            s.B * s.H * s.D * item * (2 * (s.T - 1) + 6), 4 * s.B * s.H * s.T * s.D
        ),
        lambda s: f"B={s.B} H={s.H} N={s.T} D={s.D}",
        kind="token",
        changes=("cache_k", "cache_v"),
        sweeps=("T", "batch"),
    ),
    OpSpec(  # the MLP's second matmul
        "linear_add",
        lambda s: dict(
            x=Input((s.B, 4 * s.width)),
            weight=Input((s.width, 4 * s.width), std=0.02),
            residual=Input((s.B, s.width), "stream"),
            bias=Input((s.width,), "weight", optional=True),
        ),
        lambda s, item, stream, backward: Cost(4 * s.width**2 * item, 2 * s.B * 4 * s.width**2),
        lambda s: f"{s.B}x{4 * s.width} by {s.width}x{4 * s.width}",
        kind="token",
    ),
    OpSpec(
        "sample_tokens",
        lambda s: _ring(s) | dict(logits=Input((s.B, s.V), values=_logits)),
        lambda s, item, stream, backward: Cost(s.B * s.V * item),
        lambda s: f"{s.B}x{s.V}",
        kind="token",
        outputs=(),
        options=lambda s, p, seed: dict(seed=seed, temperature=p, top_k=TOP_K),
        changes=("tokens", "counts"),
        sweeps=("batch", "V"),
    ),
)

SPECS = {spec.name: spec for spec in (*LAYERS, *OPTIMIZERS, *TOKEN)}
