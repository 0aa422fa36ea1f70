"""What a training step keeps in memory, computed without running it: on fake tensors."""

from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from irongpt.config import GPTConfig
from irongpt.model import GPT

FLOAT32 = 4  # bytes
STATE = 3  # numbers of every weight in float32: itself, AdamW's two moments


def training_bytes(config: GPTConfig, batch_size: int, ops: ModuleType, dtype: torch.dtype) -> int:
    """Weights, gradients, optimizer, and every tensor that the forward keeps for the backward.

    dtype: of the matrix products. What a kernel needs for a moment comes on top, so it is a bound
    from below; each storage counts once.
    """
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(x)  # or its number might be another's later
        return x

    alive: list[Tensor] = []
    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model = GPT(config, ops)
        copies = model.copy_weights(dtype) if dtype.itemsize == 2 else {}
        held = [*model.parameters(), *copies.values()]
        weights = {p.untyped_storage()._cdata for p in held}
        idx = torch.zeros(batch_size, config.context, dtype=torch.int64)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model.loss(idx, idx, seed=torch.zeros((), dtype=torch.int64))
        state = STATE * FLOAT32 * sum(p.numel() for p in model.parameters())
        state += sum(c.nbytes for c in copies.values())
        # A copy has the gradient of its weight, in its own type.
        state += sum(copies.get(p, p).nbytes for p in model.parameters())
    activations = sum(n for key, n in kept.items() if key not in weights)
    return state + activations
