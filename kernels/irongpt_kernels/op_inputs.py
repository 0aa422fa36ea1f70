"""The inputs of an op: the sizes of a model, a description of each tensor, and random values."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SEED = (5 << 32) + 7  # uses both halves of the generator's key
RING_SIZE = 32  # tokens of a sequence that the device holds until the host reads them
TOP_K = 20
IGNORED = -100  # the target that cross_entropy leaves out

Tensors = dict[str, Tensor]
Sizes = list[tuple[int, ...]]
Dtypes = dict[str, torch.dtype]  # by role


@dataclass(frozen=True)
class Shape:
    """A model and its batch: B sequences, H heads, T positions, head dimension D, vocabulary V,
    L layers. The defaults are the iron preset on War and Peace."""

    B: int = 64
    H: int = 6
    T: int = 256
    D: int = 64
    V: int = 104  # characters of War and Peace
    L: int = 6

    @property
    def rows(self) -> int:
        return self.B * self.T

    @property
    def width(self) -> int:
        return self.H * self.D

    def matrices(self) -> Sizes:
        """Sizes of the weight matrices in all blocks."""
        return [*block_matrices(self.width)] * self.L

    def other_weights(self) -> Sizes:
        """Sizes of the two embeddings and of the layer norms' weights."""
        return [(self.V, self.width), (self.T, self.width), *[(self.width,)] * (2 * self.L + 1)]


@dataclass(frozen=True)
class RowShape(Shape):
    """A shape whose rows and width are M and N, independent of the heads."""

    M: int = 1
    N: int = 1

    @property
    def rows(self) -> int:
        return self.M

    @property
    def width(self) -> int:
        return self.N


def block_matrices(C: int) -> list[tuple[int, int]]:
    """(rows, columns) of a block's weights: qkv, projection, fc and fc projection."""
    return [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]


@dataclass(frozen=True)
class Input:
    """A tensor that an op takes.

    role: what the tensor is, which decides its dtype: "compute" (input or result of a matmul),
        "stream" (the residual stream), "weight", "update" (the result of Muon's iteration) or
        "integer".
    optional: absent in a model of the presets, such as a bias.
    copy_of: the name of the input of which this one is a 16-bit copy; in float32 there is no copy.

    The values are one of these: normal with `mean` and standard deviation `std`; the constant
    `fill`; integers in [0, below), of which `indices` can make some IGNORED if they are
    `ignorable`; or values(x), a function of a standard normal tensor (for integers, of a tensor
    that only gives the shape and the device).
    """

    size: tuple[int, ...]
    role: str = "compute"
    std: float = 1.0
    mean: float = 0.0
    fill: float | None = None
    below: int = 0
    ignorable: bool = False
    values: Callable[[Tensor], Tensor] | None = None
    optional: bool = False
    copy_of: str = ""


def dtypes(compute: torch.dtype, **roles: torch.dtype) -> Dtypes:
    """The dtype of each `Input.role` in training under autocast, where the residual stream and the
    weights are float32. roles: dtypes that replace these."""
    wide = torch.float32
    integer = dict(integer=torch.int64)
    return dict(compute=compute, stream=wide, weight=wide, update=compute) | integer | roles


def random_inputs(
    inputs: dict[str, Input], by_role: Dtypes, device: torch.device, seed: int = 0
) -> Tensors:
    """Random inputs without the optional ones. by_role: their dtypes."""
    generator = torch.Generator(device).manual_seed(seed)
    made: Tensors = {}
    for name, one in inputs.items():
        dtype = by_role[one.role]
        if one.optional or (one.copy_of and by_role["compute"] == torch.float32):
            continue
        if one.copy_of:
            made[name] = made[one.copy_of].to(dtype)
        elif one.fill is not None:
            made[name] = torch.full(one.size, one.fill, dtype=dtype, device=device)
        elif one.below:
            made[name] = torch.randint(one.below, one.size, generator=generator, device=device)
        elif one.role == "integer" and one.values:
            made[name] = one.values(torch.empty(one.size, dtype=dtype, device=device))
        else:
            x = torch.randn(one.size, generator=generator, device=device)
            x = (one.values(x) if one.values else x).to(dtype)
            made[name] = x if one.values else one.std * x + one.mean
    return made


def indices(one: Input, ignored: bool = False) -> Tensor:
    """Integers in [0, one.below), the same on every device. ignored: some are replaced by IGNORED,
    if the input allows that."""
    found = torch.arange(math.prod(one.size)).view(one.size) * 7 % max(1, one.below)
    if ignored and one.ignorable:
        found[::5] = IGNORED
    return found


def results(
    call: Callable[[Tensors], Any], inputs: Tensors, outputs: tuple[str, ...],
    upstream: Callable[[int, Tensor], Tensor], learned: Collection[str] | None = None,
) -> Tensors:  # fmt: skip
    """Outputs by name, and the gradient of each floating input as `d name`. outputs: the names.
    upstream(i, x) returns the gradient of the loss with respect to x, which is output i. learned:
    the inputs that have a gradient, if not all."""
    leaves = {
        n: x.detach().requires_grad_(x.is_floating_point() if learned is None else n in learned)
        for n, x in inputs.items()
    }
    out = call(leaves)
    found = out if isinstance(out, tuple) else (out,)
    wanted = {n: x for n, x in leaves.items() if x.requires_grad}
    above = [(x, upstream(i, x)) for i, x in enumerate(found) if x.requires_grad]
    gradients = torch.autograd.grad(
        [x for x, _ in above], list(wanted.values()), [g for _, g in above]
    )
    named = {n: x.detach() for n, x in zip(outputs, found, strict=True)}
    return named | {f"d {n}": g for n, g in zip(wanted, gradients, strict=True)}


def widened(inputs: Tensors) -> Tensors:
    """Copies for the reference, which computes in float64."""
    return {n: x.double() if x.is_floating_point() else x.clone() for n, x in inputs.items()}


def upstream(i: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A random gradient of output i (x), in x's dtype, with values that `dtype` can hold."""
    generator = torch.Generator(x.device).manual_seed(90 + i)
    return torch.randn(x.shape, generator=generator, device=x.device).to(dtype).to(x.dtype)


def normal(size: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal float64 values on the CPU, so that they are the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dtype=torch.float64, generator=generator)
