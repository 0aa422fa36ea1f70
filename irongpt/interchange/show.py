"""`irongpt show`: one self-contained page with a text, how surprising each token is to the model,
what the model expected instead, and its attention.

A text longer than the context goes through the model in overlapping windows, so that each token but
the first ones is predicted from at least half a context.
"""

import base64
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from irongpt_kernels import eager
from torch import Tensor, nn

from irongpt.config import check
from irongpt.data.tokenizer import Tokenizer
from irongpt.files import check_result, write_result
from irongpt.generation.sample import start_ids, trained_model
from irongpt.model import GPT, Block
from irongpt.runs.run_folder import open_run

MOST = 20_000  # tokens of a page
ATTENTION = 64  # tokens whose attention is shown
ALTERNATIVES = 5
_CHUNK = 256  # rows of logits that are sorted at a time


def show(run: Path, text: str, out: Path, which: str = "best", device: str = "auto") -> str:
    """Writes the page about a text to the file `out`. Returns a line about it. Raises UserError."""
    check(bool(text), "the text is empty: give another one with --text or --file")
    model, tokenizer = trained_model(run, which, "builtin", device)
    check_result(out)
    data = analysis(model, tokenizer, text, documents=(run / "files.json").exists())
    page = Path(__file__).with_name("show.html").read_text(encoding="utf-8")
    title = html.escape(run.resolve().name.encode(errors="replace").decode())
    values = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    page = page.replace("__TITLE__", title).replace("__DATA__", values)
    write_result(out, page.encode(errors="replace"))
    return f"{data['bits_per_byte']:.4f} bits per byte, {data['summary']}"


def newest_sample(run: Path) -> str:
    """The text that the run generated at its last evaluation, or an empty one."""
    samples = [r["sample"] for r in open_run(run).records() if r.get("sample")]
    return samples[-1] if samples else ""


def analysis(model: GPT, tokenizer: Tokenizer, text: str, documents: bool) -> dict[str, Any]:
    """What the page shows of a text. documents: whether the model was trained on several."""
    before = start_ids(tokenizer, documents)  # so that the first token is predicted too
    ids = tokenizer.encode(text).tolist()
    check(
        len(ids) <= MOST,
        f"the text has {len(ids):,} tokens, and a page shows at most {MOST:,}: give a part of it",
    )
    bits, top, windows = surprisals(model, [*before, *ids], len(before))
    n_bytes = sum(len(tokenizer.token_bytes[i]) for i in ids)
    summary = f"in {len(ids):,} tokens, {n_bytes:,} bytes"
    if windows > 1:
        summary += (
            f"; longer than the context of {model.config.context:,} tokens, so in {windows:,} "
            "overlapping windows"
        )
    shown = min(ATTENTION, model.config.context, len(ids))
    last = [*before, *ids][-model.config.context :]
    weights = attention_weights(model, last)[:, :, -shown:, -shown:]  # (L, H, shown, shown)
    known = {*ids, *(i for row in top for i, _ in row)}
    return {
        "ids": ids,
        "bits": [round(b, 3) for b in bits],
        "top": top,
        "names": {i: tokenizer.token_bytes[i].decode(errors="backslashreplace") for i in known},
        "bits_per_byte": math.fsum(bits) / n_bytes,
        "summary": summary,
        "layers": model.config.n_layer,
        "heads": model.config.n_head,
        "shown": shown,
        "earlier": len(last) > shown,
        "attention": base64.b64encode(
            (weights * 255).round().to(torch.uint8).cpu().numpy().tobytes()
        ).decode(),
    }


@torch.inference_mode()
def surprisals(
    model: GPT, ids: Sequence[int], first: int
) -> tuple[list[float], list[list[tuple[int, float]]], int]:
    """Returns the surprisal in bits of each id from `first` on, the most probable ids at its
    position with their probabilities, and the number of windows. first: at least 1."""
    context, device = model.config.context, model.wte.weight.device
    bits: list[float] = []
    top: list[list[tuple[int, float]]] = []
    start, done, windows = 0, first, 0
    while done < len(ids):
        stop = min(start + context + 1, len(ids))
        window = torch.tensor(ids[start:stop], device=device)
        logits = model(window[None, :-1])[0, done - 1 - start :]  # (targets, V)
        for rows, targets in zip(
            logits.split(_CHUNK), window[done - start :].split(_CHUNK), strict=True
        ):
            p = rows.float().log_softmax(-1)
            bits += (p.gather(1, targets[:, None])[:, 0] / -math.log(2)).tolist()
            likely = p.exp().topk(min(ALTERNATIVES, p.shape[1]))
            top += [
                [(i, round(q, 4)) for i, q in zip(*row, strict=True)]
                for row in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
            ]
        windows += 1
        done = stop
        start = max(start, stop - 1 - context // 2)
    return bits, top, windows


@torch.inference_mode()
def attention_weights(model: GPT, ids: Sequence[int]) -> Tensor:
    """The attention weights (L, H, T, T) of T ids, at most a context."""
    H, D = model.config.n_head, model.config.n_embd // model.config.n_head
    found: list[Tensor] = []

    def record(_module: nn.Module, _inputs: object, qkv: Tensor) -> None:
        q, k, _ = qkv.view(len(ids), 3, H, D).permute(1, 2, 0, 3).float()  # (H, T, D) each
        found.append(eager.softmax(q @ k.transpose(1, 2), scale=D**-0.5, causal=True))

    blocks = cast(Sequence[Block], model.blocks)
    hooks = [block.attn.qkv.register_forward_hook(record) for block in blocks]
    try:
        model(torch.tensor([list(ids)], device=model.wte.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)
