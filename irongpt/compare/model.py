"""A GPT on a candidate's ops against the same on eager: one step, and a training curve."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from irongpt_kernels import Ops, eager
from torch import Tensor

from irongpt import device as devices
from irongpt.compare.ops import SEED, Check, Row, make_rows
from irongpt.config import PRESETS, GPTConfig, TrainConfig
from irongpt.console import say
from irongpt.data import corpus
from irongpt.data.tokenizer import CharTokenizer
from irongpt.errors import one_line
from irongpt.model import GPT
from irongpt.training.trainer import Trainer

LOSS_SCALE = 4096.0  # keeps small gradients in float16's range, and large ones too

# Because of rounding, the losses of two correct runs in float32 slowly diverge. In the first
# CHECKED_STEPS their relative difference may be at most MAX_DIFFERENCE. Later, and in 16 bits, it
# is only printed.
CHECKED_STEPS, MAX_DIFFERENCE = 32, 2e-5


@dataclass(frozen=True)
class Curve:
    """Training losses of candidate and eager from the same seed."""

    dtype: str
    candidate: list[float]
    eager: list[float]

    @property
    def differences(self) -> list[float]:
        """Relative differences by step."""
        return [abs(a - b) / abs(b) for a, b in zip(self.candidate, self.eager, strict=True)]

    def check(self) -> Check:
        differences = self.differences
        checked = min(CHECKED_STEPS, len(differences))
        finite = all(d < float("inf") for d in differences)
        near = self.dtype != "float32" or all(d <= MAX_DIFFERENCE for d in differences[:checked])
        largest = max(differences[:checked]) if finite else float("nan")
        detail = (
            f"losses differ from eager's by up to {largest:.1e} in the first {checked} steps, "
            f"allowed {MAX_DIFFERENCE:.0e}"
        )
        return Check("model", "training", self.dtype, "loss curve", finite and near, detail)


@dataclass(frozen=True)
class Setting:
    """The model and its training, as large as the device allows."""

    model: GPTConfig
    recipe: TrainConfig
    ids: Tensor  # (N,) int64

    @property
    def sizes(self) -> str:
        m = self.model
        return f"{m.n_layer} layers, width {m.n_embd}, context {m.context}, dropout {m.dropout}"


def setting(full: bool, with_dropout: bool) -> Setting:
    """full: the iron preset's model, else a small one of its kind."""
    text = corpus.load("python-docs", say=say).text[:100_000]
    tokenizer = CharTokenizer.from_text(text)
    iron = PRESETS["iron"]
    small = dict(n_layer=2, n_head=2, n_embd=32, context=32)
    model = GPTConfig(vocab_size=tokenizer.vocab_size, **iron.model | ({} if full else small))
    short = dict(iters=100, batch_size=8) if full else dict(iters=20, batch_size=2, lr=3e-3)
    recipe = TrainConfig(**iron.train | short)
    model = model if with_dropout else replace(model, dropout=0.0)
    return Setting(model, recipe, tokenizer.encode(text))


def compare_model(
    s: Setting, candidate: Ops, dtypes: Iterable[torch.dtype], device: torch.device
) -> tuple[list[Row], list[Check], list[Curve]]:
    """One step and a training run in each dtype."""
    rows, checks, curves = [], [], []
    for dtype in dtypes:
        try:
            rows += compare_step(s, candidate, dtype, device)
            curves.append(train_both(s, candidate, dtype, device))
            checks.append(curves[-1].check())
        except Exception as e:  # as in compare_case, this is reported and the others continue
            name = devices.dtype_name(dtype)
            checks.append(Check("model", "one step", name, "runs", False, one_line(e)))
    return rows, checks, curves


def compare_step(s: Setting, candidate: Ops, dtype: torch.dtype, device: torch.device) -> list[Row]:
    """Logits and every parameter's gradient, from the same weights and batch."""
    computed = ((candidate, dtype), (eager, dtype), (eager, torch.float64))
    results = [_step(s, ops, each, device) for ops, each in computed]
    return make_rows("model", "one step", s.sizes, devices.dtype_name(dtype), *results)


def _step(s: Setting, ops: Ops, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    t = _trainer(s, ops, dtype, device)
    x, y = t.train_batches(0)
    if dtype == torch.float64:
        t.model.double()
    scale = torch.tensor(LOSS_SCALE if dtype == torch.float16 else 1.0, device=device)
    with devices.autocast(device, torch.float32 if dtype == torch.float64 else dtype):
        logits = t.model(x, seed=SEED)
        loss = t.model.loss(x, y, seed=SEED, loss_scale=scale)
    loss.backward(scale.to(loss.dtype))
    gradients = {
        f"d {n}": t.optimizer.gradient(p).to(p.dtype) / scale for n, p in t.model.named_parameters()
    }
    return {"logits": logits.detach(), **gradients}


def train_both(s: Setting, candidate: Ops, dtype: torch.dtype, device: torch.device) -> Curve:
    losses = [
        [float(t.train_step()[0]) for _ in range(s.recipe.iters)]
        for t in (_trainer(s, ops, dtype, device) for ops in (candidate, eager))
    ]
    return Curve(devices.dtype_name(dtype), *losses)


def _trainer(s: Setting, ops: Ops, dtype: torch.dtype, device: torch.device) -> Trainer:
    torch.manual_seed(s.recipe.seed)
    return Trainer(GPT(s.model, ops).to(device), s.ids, s.recipe, device, dtype)
