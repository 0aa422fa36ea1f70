"""The names and shapes of Hugging Face's GPT2LMHeadModel: config.json and the tensors.

Its linear layers are of the class Conv1D, whose weight is (inputs, outputs): the transpose of
ours. Every norm and linear layer has a bias. The head is the token embedding and is not stored.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from irongpt.config import GPTConfig, check
from irongpt.errors import UserError

Tensors = dict[str, Tensor]

PREFIX = "transformer."
BLOCK = {  # a layer of our block, and of theirs
    "ln_1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "ln_2": "ln_2",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}
# Settings that change the computation of a GPT-2, and the values for which it equals our model's.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
SIZES = {  # the fields of GPTConfig, and theirs
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "context": "n_positions",
}


def to_config_json(config: GPTConfig, end: int | None, dtype: str) -> dict[str, Any]:
    """config.json. end: the id of <|endoftext|>. dtype: that of the tensors."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{name: values[0] for name, values in REQUIRED.items()},
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": dtype,
    }


def from_config_json(values: dict[str, Any], bias: bool) -> GPTConfig:
    """The shape of a GPT-2 with this config.json, without dropout.

    Raises UserError for another architecture. A setting that is missing has GPT-2's default.
    """
    for name, accepted in REQUIRED.items():
        value = values.get(name, accepted[0] if name != "model_type" else None)
        check(value in accepted, f"its {name} is {value!r}, and our model needs {accepted[0]!r}")
    sizes: dict[str, Any] = {ours: values.get(theirs) for ours, theirs in SIZES.items()}
    for name, size in sizes.items():
        check(type(size) is int, f"its {SIZES[name]} is {size!r}, which must be an integer")
    inner = values.get("n_inner")
    check(
        inner is None or inner == 4 * sizes["n_embd"],
        f"its n_inner is {inner!r}, and our model needs 4 n_embd",
    )
    return GPTConfig(**sizes, dropout=0.0, bias=bias)


def parameters(config: GPTConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Our name of each parameter of a model with biases, theirs, and our shape."""
    C = config.n_embd
    yield "wte.weight", f"{PREFIX}wte.weight", (config.vocab_size, C)
    yield "wpe.weight", f"{PREFIX}wpe.weight", (config.context, C)
    matrices = iter(config.matrices())
    shapes = {ours: (C,) if ours.startswith("ln_") else next(matrices) for ours in BLOCK}
    layers = [
        (f"blocks.{i}.{ours}", f"h.{i}.{theirs}", shapes[ours])
        for i in range(config.n_layer)
        for ours, theirs in BLOCK.items()
    ]
    for ours, theirs, shape in [*layers, ("ln_f", "ln_f", (C,))]:
        yield f"{ours}.weight", f"{PREFIX}{theirs}.weight", shape
        yield f"{ours}.bias", f"{PREFIX}{theirs}.bias", shape[:1]


def transposed(name: str, t: Tensor) -> Tensor:
    """A parameter, whose name is ours or theirs, in the layout of the other side."""
    linear = t.dim() == 2 and name.startswith(("blocks.", f"{PREFIX}h."))
    return t.T.contiguous() if linear else t


def to_gpt2(weights: Tensors, config: GPTConfig, dtype: torch.dtype) -> Tensors:
    """Their tensors for the state_dict of a model. Where it has no bias, theirs is zero."""
    if not config.bias:
        shapes = {ours: shape for ours, _, shape in parameters(config) if ours.endswith(".bias")}
        weights = {name: torch.zeros(shape) for name, shape in shapes.items()} | weights
    names = ((ours, theirs) for ours, theirs, _ in parameters(config))
    return {theirs: transposed(ours, weights[ours].to(dtype)) for ours, theirs in names}


def from_gpt2(tensors: Tensors, config: GPTConfig) -> Tensors:
    """The inverse of `to_gpt2`: a state_dict in float32. Raises UserError if a tensor does not fit.

    Names may lack the prefix, and the buffers with the causal mask and a head that is equal to the
    token embedding may be there, as in OpenAI's own GPT-2.
    """
    masks = (".attn.bias", ".attn.masked_bias")
    left = {k.removeprefix(PREFIX): t for k, t in tensors.items() if not k.endswith(masks)}
    head = left.pop("lm_head.weight", None)
    check(
        head is None or ("wte.weight" in left and torch.equal(head, left["wte.weight"])),
        "its head is not the token embedding, and our model needs tied embeddings",
    )
    weights: Tensors = {}
    for ours, theirs, shape in parameters(config):
        name = theirs.removeprefix(PREFIX)
        t = left.pop(name, None)
        if ours.endswith(".bias") and not config.bias:  # zeros
            continue
        if t is None:
            raise UserError(f"it has no tensor {name}")
        weights[ours] = transposed(ours, t).float().contiguous()
        check(weights[ours].shape == shape, f"the shape of its {name} does not fit its config.json")
    check(not left, f"it has tensors that our model lacks, such as {min(left, default='')}")
    return weights
