"""The settings of a model, of its training and of sampling, and the presets.

A field made by `option` is a flag of the command line. The other fields are set by a preset and
stored in config.json. Every value is checked when the object is made.
"""

import math
import reprlib
import sys
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar, get_origin

from irongpt.errors import UserError

Config = TypeVar("Config", "GPTConfig", "TrainConfig", "DataConfig", "SampleConfig")
# The flags that the user gave: fields of the configs by name, and preset, data, out.
Flags = dict[str, Any]

OPS = ("eager", "builtin", "fused")
OPTIMIZERS = ("adamw", "muon")
TOKENIZERS = ("char", "bpe")
DTYPES = ("float32", "float16", "bfloat16")
WAR_AND_PEACE_VOCAB = 104  # characters of the text as `data.corpus` yields it


def option(
    group: str, help: str, default: Any = MISSING, choices: tuple[str, ...] | None = None
) -> Any:
    """A dataclass field that is also a flag. group: its section in `irongpt train --help`."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})


def check(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. Models of equal shape can load the same weights."""

    vocab_size: int
    n_layer: int = option("model", "number of transformer blocks")
    n_head: int = option("model", "attention heads per block")
    n_embd: int = option("model", "embedding size, a multiple of --n-head")
    context: int = option("model", "context length in tokens")
    dropout: float = option("model", "dropout probability, in [0, 1)")
    bias: bool = False
    branch_std: float = 0.02  # initial standard deviation of qkv and fc, the branches' first layers

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "context"):
            check(getattr(self, name) >= 1, f"{flag(name)} must be at least 1")
            check(getattr(self, name) <= 10**9, f"{flag(name)} must be at most 10^9")
        check(
            self.n_embd % self.n_head == 0,
            f"--n-embd ({self.n_embd}) must be divisible by --n-head ({self.n_head})",
        )
        check(
            0 < self.branch_std <= 1,
            f"branch_std must be above 0 and at most 1, got {self.branch_std}",
        )
        check(0 <= self.dropout < 1, f"--dropout must be in [0, 1), got {self.dropout}")
        check(
            self.n_params() <= 10**10,
            f"a model of {self.n_params():,} parameters is too large: "
            "use a smaller --n-embd, --n-layer or --context",
        )

    def n_params(self) -> int:
        """Number of parameters. The output head shares the token embedding."""
        C, L = self.n_embd, self.n_layer
        weights = 12 * C * C * L + (self.vocab_size + self.context) * C + (2 * L + 1) * C
        biases = 11 * C * L + C  # qkv 3, projections 2, fc 4, norms 2 in a block; the last norm
        return weights + (biases if self.bias else 0)

    def matrices(self) -> list[tuple[int, int]]:
        """(rows, columns) of a block's weight matrices: qkv, projection, fc, fc projection."""
        from irongpt_kernels.op_inputs import block_matrices  # imports torch

        return block_matrices(self.n_embd)

    def flops_per_token(self) -> int:
        """FLOPs of one training token, forward and backward, as PaLM's appendix B counts them.

        6 for every weight of a matmul (the position embedding is in none), and 12 C per layer and
        position for the two matmuls of attention over the full T x T matrix.
        """
        C, T = self.n_embd, self.context
        return 6 * (self.n_params() - T * C) + 12 * self.n_layer * C * T


@dataclass(frozen=True)
class TrainConfig:
    """The training recipe, and the machine settings of a run."""

    iters: int = option(
        "recipe",
        "training steps. Without this flag, a run with BPE stops earlier if it has had 20 epochs "
        "(presets code and nano-code: 3)",
    )
    batch_size: int = option(
        "recipe", "sequences per batch; a step takes --grad-accum batches; see also --shards"
    )
    lr: float = option("recipe", "peak learning rate of AdamW and of Muon")
    warmup: int = option("recipe", "steps of linear warmup of the learning rate")
    decay: str = option(
        "recipe",
        "shape of the learning rate after the warmup",
        choices=("constant", "linear", "cosine"),
    )
    weight_decay: float = option("recipe", "weight decay of matrices, not of norms and biases")
    eval_every: int = option("run", "steps between evaluations; each saves a checkpoint")
    optimizer: str = option(
        "recipe", "muon: Muon in the blocks, AdamW elsewhere", "adamw", OPTIMIZERS
    )
    grad_accum: int = option(
        "recipe", "forward and backward passes per step; their gradients are averaged", 1
    )
    shards: int = option(
        "recipe",
        "split each batch into N shards. The weights are bit-identical on any number of GPUs that "
        "divides N (unless dropout is used with --ops builtin). Under torchrun the default is the "
        "number of processes",
        1,
    )
    target_loss: float | None = option("run", "stop when the validation loss is at most X", None)
    patience: int | None = option(
        "run", "stop after this many evaluations without a lower validation loss", None
    )
    tokenizer: str = option(
        "run", "char: one token per character; bpe: byte pair encoding", "char", TOKENIZERS
    )
    seed: int = option("run", "seed of the weights, batches, dropout and samples", 1337)
    ops: str = option(
        "machine",
        "eager: plain PyTorch; builtin: PyTorch's own fast functions; fused: our Triton kernels",
        "builtin",
        OPS,
    )
    device: str = option("machine", "cpu, cuda or cuda:N; auto is a GPU if there is one", "auto")
    dtype: str = option(
        "machine",
        "dtype of the matmuls; auto is float32 on a CPU; on a GPU it is bfloat16 from compute "
        "capability 8.0 on, and float16 with loss scaling at 7.0 and 7.5 (a T4)",
        "auto",
        ("auto", *DTYPES),
    )
    graph: bool = True  # on a GPU a step is one CUDA graph; --no-graph
    tensorboard: bool = False  # --tensorboard
    min_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.95  # of Muon
    grad_clip: float = 1.0
    ema: float = 0.0  # decay of the weights' moving average, which is evaluated; 0: no average
    eval_windows: int = 1 << 30  # sequences of the context's length per evaluation; by default all
    log_every: int = 10
    sample_tokens: int = option("run", "tokens to generate at each evaluation; 0: none", 200)

    def __post_init__(self) -> None:
        for name in ("iters", "batch_size", "eval_every", "grad_accum", "eval_windows", "shards"):
            check(getattr(self, name) >= 1, f"{flag(name)} must be at least 1")
        check(
            self.batch_size % self.shards == 0,
            f"--batch-size ({self.batch_size}) must be divisible by --shards ({self.shards}), "
            "which is the number of processes unless it is given",
        )
        check(self.patience is None or self.patience >= 1, "--patience must be at least 1")
        for name in ("iters", "batch_size", "eval_every", "grad_accum", "warmup"):
            check(getattr(self, name) <= 10**9, f"{flag(name)} must be at most 10^9")
        for name in ("warmup", "weight_decay", "min_lr", "sample_tokens"):
            check(getattr(self, name) >= 0, f"{flag(name)} must not be negative")
        for name in ("lr", "grad_clip", "log_every"):
            check(getattr(self, name) > 0, f"{flag(name)} must be above 0")
        for name in ("lr", "weight_decay", "min_lr", "target_loss"):
            finite = abs(getattr(self, name) or 0) <= sys.float_info.max
            check(finite, f"{flag(name)} must be a finite number")
        for name in ("beta1", "beta2", "momentum", "ema"):
            check(0 <= getattr(self, name) < 1, f"{flag(name)} must be in [0, 1)")
        check(0 <= self.seed < 2**31, "--seed must be in [0, 2^31)")
        check_choices(self)


@dataclass(frozen=True)
class DataConfig:
    """Which text a run is trained on, and how its files are read: the arguments of corpus.load."""

    sources: tuple[str, ...]  # built-in names, and absolute paths of files and folders
    include: tuple[str, ...] = ()
    encoding: str | None = None
    errors: str = "strict"
    val: str | None = None  # the validation text, given like one of sources; None: a tenth of them


@dataclass(frozen=True)
class SampleConfig:
    """How text is sampled from a model."""

    tokens: int = option("sampling", "number of tokens to generate", 1000)
    temperature: float = option("sampling", "divides the logits; 0 is greedy decoding", 0.8)
    samples: int = option(
        "sampling", "sequences to generate, as one batch; lines '---' between them", 1
    )
    top_k: int | None = option("sampling", "sample only from the N most probable tokens", None)
    top_p: float | None = option(
        "sampling",
        "sample only from the most probable tokens whose probabilities add up to X (nucleus)",
        None,
    )
    seed: int = option("sampling", "the same seed gives the same text", 1337)

    def __post_init__(self) -> None:
        check(self.tokens >= 0, "--tokens must not be negative")
        check(1 <= self.samples <= 10_000, "--samples must be from 1 to 10,000")
        finite = 0 <= self.temperature < math.inf
        check(finite, "--temperature must be a finite number, 0 or above")
        check(self.top_k is None or self.top_k >= 1, "--top-k must be at least 1")
        check(self.top_p is None or 0 < self.top_p <= 1, "--top-p must be in (0, 1]")
        check(0 <= self.seed < 2**63, "--seed must be in [0, 2^63)")


@dataclass(frozen=True)
class Preset:
    """Values for a GPTConfig and a TrainConfig; the vocabulary comes from the corpus.

    data: the default corpora. epochs: with BPE, the limit of a run, because BPE makes a corpus
    shorter.
    """

    summary: str
    model: dict[str, Any]
    train: dict[str, Any]
    data: tuple[str, ...] = ()
    epochs: float = 20.0
    vocab_size: int | None = None  # of BPE; None: it depends on the size of the text


IRON = dict(n_layer=6, n_head=6, n_embd=384, context=256, dropout=0.2)
MANY_STEPS: dict[str, Any] = dict(
    iters=5000, batch_size=64, lr=3e-4, warmup=0, decay="constant", weight_decay=0.01,
    eval_every=500,
)  # fmt: skip
FEW_STEPS: dict[str, Any] = dict(
    batch_size=16, lr=6e-3, warmup=20, decay="linear", weight_decay=0.1, eval_every=100,
    optimizer="muon", beta2=0.99,
)  # fmt: skip

PRESETS = {
    "iron": Preset(
        "10.8 M parameters, 82 M training tokens, for a GPU",
        model=IRON,
        train=MANY_STEPS,
    ),
    "fast": Preset(  # it sees less than an epoch, so it cannot overfit and needs no dropout
        "iron's model and 2.5 M training tokens, for a GPU",
        model=IRON | dict(dropout=0.0),
        train=dict(iters=600, **FEW_STEPS),
    ),
    "best": Preset(  # nine epochs of a book: dropout and decay limit overfitting
        "iron's model with BPE, the best recipe known for 10 M training tokens, for a GPU",
        model=IRON | dict(dropout=0.1),
        train=FEW_STEPS
        | dict(iters=2441, lr=4e-3, weight_decay=0.3, eval_every=250, tokenizer="bpe"),
        vocab_size=1024,
    ),
    "nano": Preset(
        "0.8 M parameters, a few minutes on a CPU",
        model=dict(n_layer=4, n_head=4, n_embd=128, context=64, dropout=0.0, branch_std=0.088),
        train=FEW_STEPS | dict(iters=1700, eval_every=250, eval_windows=512, ema=0.97),
    ),
    "code": Preset(
        "iron's model with context 512 and BPE, for Python code, for a GPU",
        model=IRON | dict(context=512, dropout=0.0),
        train=FEW_STEPS | dict(iters=5000, eval_every=250, tokenizer="bpe", patience=6),
        data=("python-packages",),
        epochs=3.0,
        vocab_size=4096,
    ),
    "nano-code": Preset(
        "1.3 M parameters with BPE, for Python code, minutes on a CPU",
        model=dict(n_layer=4, n_head=4, n_embd=128, context=128, dropout=0.0),
        train=FEW_STEPS
        | dict(
            batch_size=8, iters=3000, eval_every=250, eval_windows=256, tokenizer="bpe", patience=6
        ),
        data=("python-code",),
        epochs=3.0,
        vocab_size=4096,
    ),
}


def flag(name: str) -> str:
    """The flag of a field: --n-layer for n_layer."""
    return "--" + name.replace("_", "-")


def check_choices(config: Any) -> None:
    for f in fields(config):
        choices, value = f.metadata.get("choices"), getattr(config, f.name)
        check(
            not choices or value in choices,
            f"{flag(f.name)} must be one of {', '.join(choices or ())}, got {reprlib.repr(value)}",
        )


ADDED_LATER = {"patience", "tokenizer", "shards", "tensorboard", "branch_std", "val"}


def from_json(cls: type[Config], values: Any) -> Config:
    """The config of its `vars`. Raises UserError on a missing or unknown field or a wrong type.

    A field in ADDED_LATER may be missing, as in older runs: it then has its default.
    """
    known = {f.name: f for f in fields(cls)}
    if not isinstance(values, dict):
        raise UserError(f"a {cls.__name__} cannot be {reprlib.repr(values)}")
    for what, names in (
        ("unknown", values.keys() - known.keys()),
        ("missing", known.keys() - ADDED_LATER - values.keys()),
    ):
        if names:
            raise UserError(
                f"fields of its {cls.__name__} are {what}: {reprlib.repr(sorted(names))}"
            )
    for name, value in values.items():
        if not _has_type(value, known[name].type):
            raise UserError(f"{name} of a {cls.__name__} cannot be {reprlib.repr(value)}")
    return cls(**values)


def _has_type(value: Any, annotation: Any) -> bool:
    if value is None:
        return type(None) in getattr(annotation, "__args__", ())
    if get_origin(annotation) is tuple:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    types = getattr(annotation, "__args__", (annotation,))
    return type(value) in types or (float in types and type(value) is int)
