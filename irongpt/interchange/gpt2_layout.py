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
EMBEDDINGS = ("wte", "wpe")
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


def layers(config: GPTConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Our name of each layer with parameters, theirs, and the shape of our weight."""
    C = config.n_embd
    shapes = iter(config.matrices())
    block = {name: (C,) if name.startswith("ln_") else next(shapes) for name in BLOCK}
    yield "wte", "wte", (config.vocab_size, C)
    yield "wpe", "wpe", (config.context, C)
    for i in range(config.n_layer):
        for ours, theirs in BLOCK.items():
            yield f"blocks.{i}.{ours}", f"h.{i}.{theirs}", block[ours]
    yield "ln_f", "ln_f", (C,)


def to_gpt2(weights: Tensors, config: GPTConfig, dtype: torch.dtype) -> Tensors:
    """Their tensors for the state_dict of a model. Where it has no bias, theirs is zero."""
    tensors: Tensors = {}
    for ours, theirs, shape in layers(config):
        weight = weights[f"{ours}.weight"].to(dtype)
        if ours in EMBEDDINGS:
            tensors[f"{PREFIX}{theirs}.weight"] = weight
            continue
        bias = weights.get(f"{ours}.bias", torch.zeros(shape[0])).to(dtype)
        tensors[f"{PREFIX}{theirs}.weight"] = weight.T.contiguous() if len(shape) == 2 else weight
        tensors[f"{PREFIX}{theirs}.bias"] = bias
    return tensors


def from_gpt2(tensors: Tensors, config: GPTConfig) -> Tensors:
    """The inverse of `to_gpt2`: a state_dict in float32. Raises UserError if a tensor does not fit.

    Names may lack the prefix, and the buffers with the causal mask and a head that is equal to the
    token embedding may be there, as in OpenAI's own GPT-2.
    """
    left = {name.removeprefix(PREFIX): t for name, t in tensors.items()}
    head = left.pop("lm_head.weight", None)
    check(
        head is None or ("wte.weight" in left and torch.equal(head, left["wte.weight"])),
        "its head is not the token embedding, and our model needs tied embeddings",
    )
    left = {k: t for k, t in left.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    weights: Tensors = {}

    def take(theirs: str, ours: str, shape: tuple[int, ...], transposed: bool = False) -> None:
        t = left.pop(theirs, None)
        if t is None:
            raise UserError(f"it has no tensor {theirs}")
        t = t.T if transposed and t.dim() == 2 else t
        check(t.shape == shape, f"the shape of its {theirs} does not fit its config.json")
        weights[ours] = t.float().contiguous()

    for ours, theirs, shape in layers(config):
        linear = len(shape) == 2 and ours not in EMBEDDINGS
        take(f"{theirs}.weight", f"{ours}.weight", shape, transposed=linear)
        if ours in EMBEDDINGS:
            continue
        if config.bias:
            take(f"{theirs}.bias", f"{ours}.bias", shape[:1])
        else:
            left.pop(f"{theirs}.bias", None)  # zeros
    check(not left, f"it has tensors that our model lacks, such as {min(left, default='')}")
    return weights
