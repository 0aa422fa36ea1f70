"""`irongpt show`: the numbers of the page, and the page in a headless Chromium if there is one."""

import base64
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_refused
from irongpt_kernels import eager
from model_helpers import CONFIG, build

from irongpt.data.tokenizer import BPETokenizer
from irongpt.generation.sample import trained_model
from irongpt.interchange.show import analysis, attention_weights, surprisals

TEXT = "all happy families is alike\nunhappy family all its"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=2000"
).split()


def data_of(page: Path) -> dict:
    script = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text()
    )
    assert script
    return json.loads(script[1])


def test_the_numbers_are_those_of_the_model(cli, tmp_path, run) -> None:
    result = cli("show", run, "--text", TEXT, "--out", "page.html")
    data = data_of(tmp_path / "page.html")
    model, tokenizer = trained_model(tmp_path / run, "best", "eager", "cpu")
    ids = tokenizer.encode("\n" + TEXT)
    assert data["ids"] == ids[1:].tolist()
    with torch.no_grad():  # the first window is the first context
        p = model(ids[None, :16])[0].softmax(-1)
    for i in range(16):
        token = int(ids[i + 1])
        assert data["bits"][i] == pytest.approx(-math.log2(p[i, token]), abs=2e-3)
        likely = p[i].topk(5)
        assert [q for _, q in data["top"][i]] == pytest.approx(likely.values.tolist(), abs=2e-4)
        assert [t for t, _ in data["top"][i]] == likely.indices.tolist()
    assert data["bits_per_byte"] == pytest.approx(sum(data["bits"]) / len(TEXT), abs=1e-3)
    assert f"{data['bits_per_byte']:.4f} bits per byte" in result.out
    assert "longer than the context of 16 tokens, so in 6 overlapping windows" in result.out
    assert {data["names"][str(i)] for i in data["ids"]} == set(TEXT)


def test_every_token_of_a_long_text_has_half_a_context() -> None:
    model, n = build().eval(), 100
    ids = torch.randint(CONFIG.vocab_size, (n,), generator=torch.Generator().manual_seed(0))
    bits, top, windows = surprisals(model, ids.tolist(), 1)
    assert (len(bits), len(top)) == (n - 1, n - 1)
    half = CONFIG.context // 2
    assert windows == 1 + math.ceil((n - 1 - CONFIG.context) / half)
    for i in (1, 5, CONFIG.context, CONFIG.context + 1, 60, n - 1):
        expected = []
        for first in range(max(0, i - CONFIG.context), max(0, i - half - 1) + 1):
            with torch.no_grad():
                p = model(ids[None, first:i])[0, -1].softmax(-1)
            expected.append(-math.log2(p[ids[i]]))
        assert min(abs(bits[i - 1] - e) for e in expected) < 1e-3, i


def test_the_attention_is_that_of_the_model() -> None:
    """The weights times the values give what the attention op gives, in every layer and head."""
    model = build().eval()
    idx = torch.arange(CONFIG.context)
    found: list = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda m, i, out: found.append(out))
    weights = attention_weights(model, idx.tolist())
    assert weights.shape == (3, 2, CONFIG.context, CONFIG.context)
    for layer, qkv in zip(weights, found, strict=True):
        qkv = qkv.view(1, CONFIG.context, 3, 2, 16)
        expected = eager.causal_attention_packed(qkv)[0].transpose(0, 1)
        torch.testing.assert_close(layer @ qkv[0, :, 2].transpose(0, 1), expected)


def test_special_characters_and_parts_of_characters() -> None:
    model = build(replace(CONFIG, vocab_size=257)).eval()
    data = analysis(model, BPETokenizer(()), "</script>é", documents=True)
    assert "".join(data["names"][i] for i in data["ids"]) == "</script>\\xc3\\xa9"
    attention = base64.b64decode(data["attention"])
    assert len(attention) == 3 * 2 * data["shown"] ** 2
    assert 0 < attention[0] < 255  # the first token also attends to <|endoftext|>, before it
    assert data["earlier"]
    assert set(attention[1 : data["shown"]]) == {0}  # and to none after it


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("run --text ☃", "the character '☃'"),
        ("run --text=", "the text is empty"),
        ("run --file nowhere", "cannot read the file nowhere"),
        ("run --file text.gz", "the file text.gz is compressed"),
        ("run --file long", "a page shows at most 20,000: give a part of it"),
        ("run --text a --file b", "not allowed with"),
        ("run --text a --errors replace", "are for --file"),
        ("run --text a --out .", ". is a folder"),
        ("run --text a --out no/page.html", "its folder does not exist"),
        ("nowhere --text a", "it has no config.json"),
        ("nowhere", "it has no config.json"),
    ],
)
def test_a_mistake_writes_nothing(cli, tmp_path, run, args, message) -> None:
    (tmp_path / "text.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "long").write_text("all " * 5001)
    assert_refused(cli, message, "show", *args.split(" "))


def test_without_a_text_the_newest_sample_is_shown(cli, tmp_path, run) -> None:
    cli("show", run)
    record = json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1])
    data = data_of(tmp_path / run / "show.html")
    assert "".join(data["names"][str(i)] for i in data["ids"]) == record["sample"]


# What a user does with the page, and what it then holds.
SCRIPT = """<script>
const key = (box, key) => box.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const seen = { errors: [] };
seen.bits = $("bits").textContent;
seen.tokens = [...$("text").children].map(e => e.textContent).join("");
seen.tints = new Set([...$("text").children].map(e => getComputedStyle(e).borderBottomColor)).size;
seen.colours = new Set([...$("text").children].map(e => e.style.background)).size;
$("text").children[4].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
seen.pointed = $("detail").textContent;
$("text").children[6].click();
seen.tapped = $("detail").textContent;
$("text").focus();
key($("text"), "ArrowRight");
seen.key = $("detail").textContent;
seen.alternatives = $("top").children.length;
key($("text"), "Home");
seen.home = $("detail").textContent;
const pixels = () => $("matrix").toDataURL();
const before = pixels();
$("layer").value = 0;
$("layer").dispatchEvent(new Event("change"));
seen.redrawn = pixels() !== before;
key($("last"), "ArrowLeft");
seen.looks = $("looks").textContent;
seen.overflow = document.documentElement.scrollWidth > innerWidth;
document.body.replaceChildren(Object.assign(document.createElement("pre"), {
  id: "seen", textContent: JSON.stringify(seen) }));
</script>"""


@pytest.fixture
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("needs Chromium")
    return found


def run_browser(browser: str, page: Path, profile: Path, *flags: str) -> str:
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_the_page_in_a_browser(cli, tmp_path, run, browser) -> None:
    page = tmp_path / "page.html"
    cli("show", run, "--text", TEXT, "--out", page)
    data = data_of(page)
    assert re.findall(r"(?:src|href|url)[=(]\"?([^\" )]*)", page.read_text()) == ["data:,"]
    page.write_text(page.read_text().replace("</html>", SCRIPT + "</html>"))
    profile = tmp_path / "profile"
    dom = run_browser(browser, page, profile, "--window-size=390,800", "--dump-dom")
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom)
    assert found, dom[-2000:]
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["bits"] == f"{data['bits_per_byte']:.3f}"
    assert seen["tokens"] == TEXT.replace("\n", "↵\n")
    assert seen["tints"] == 2
    assert seen["colours"] > 10
    for name, i in (("pointed", 4), ("tapped", 6), ("key", 7), ("home", 0)):
        assert seen[name].startswith(f"token {i + 1}: {TEXT[i]} {data['bits'][i]:.2f} bits"), name
    assert seen["alternatives"] == 5
    assert seen["redrawn"]
    assert seen["looks"].startswith(f"{TEXT[-2]} attends to ")
    assert not seen["overflow"]  # on a phone
