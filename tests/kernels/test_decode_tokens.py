"""Sampled tokens: those of eager, and the same by the kernel."""

import math

import pytest
import torch
from irongpt_kernels import eager, fused
from irongpt_kernels.fused import decode_tokens
from numerics import DEVICE, HALVES, values
from torch import Tensor

LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.1]).log() + 5
SEED = (5 << 32) + 7
# NumPy warns of rows that cannot be sampled from, and of temperatures beyond float32.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
each = pytest.mark.parametrize("ops", [eager, fused], ids=["eager", "fused"])


def sampled(ops, logits: Tensor, number: int = 0, seed: int | Tensor = SEED, **how) -> list[int]:
    """Token `number` of sequences whose logits are the rows."""
    B, N = len(logits), 3
    ring = torch.full((B, N), -9, device=DEVICE)
    counts = torch.tensor([[number, 5]] * B, device=DEVICE).reshape(B, 2)
    ops.sample_tokens(logits.to(DEVICE), ring, counts, seed, **how)
    assert counts.tolist() == [[number + 1, 6]] * B
    assert (ring == -9).sum() == B * (N - 1)
    return ring[:, number % N].tolist()


def shares(ops, logits: Tensor, samples: int = 2000, **how) -> Tensor:
    """How often each token is sampled by that many sequences."""
    found = sampled(ops, logits.expand(samples, -1), **how)
    return torch.bincount(torch.tensor(found), minlength=len(logits)) / samples


HOW = [
    {},
    dict(temperature=0.0),
    dict(temperature=0.7),
    dict(temperature=1e-300),
    dict(temperature=1e9),
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=1000),
    dict(top_p=1e-20),
    dict(top_p=0.4),
    dict(top_p=0.95, temperature=2.0),
    dict(top_p=1.0),
    dict(top_k=9, top_p=0.6),
]


@pytest.mark.parametrize(
    ("how", "dtype"),
    [*((how, torch.float32) for how in HOW), *((how, h) for h in HALVES for how in HOW[::3])],
    ids=str,
)
def test_the_kernel_samples_the_tokens_of_eager(how: dict, dtype, monkeypatch) -> None:
    """Among them rows of equal logits, of a few values, of 0 and -0, and one sure one.

    In float32 a row takes two blocks.
    """
    if dtype == torch.float32:
        monkeypatch.setattr(decode_tokens, "MAX_BLOCK", 32)
    logits = values(6, 37, dtype=dtype) * 3
    logits[1] = 2.0
    logits[2] = logits[2].round()
    logits[3] = 0.0
    logits[3, ::2] = -0.0
    logits[4, 30] = 200.0
    logits[5] = -logits[5].abs() - 60000 if dtype == torch.float16 else logits[5] - 1e30
    assert sampled(fused, logits, 2**33 + 1, **how) == sampled(eager, logits, 2**33 + 1, **how)


LIMITS_AT_LARGE_VOCABULARIES = {
    4096: dict(top_k=500, top_p=0.5), 8192: dict(top_p=0.9), 16384: {}, 50304: dict(top_k=16000)
}  # fmt: skip


@pytest.mark.parametrize("V", LIMITS_AT_LARGE_VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_vocabularies(V: int, dtype: torch.dtype) -> None:
    """Many logits of a float16 row are equal. The last row has its likeliest token at its end."""
    logits = (values(2, V, dtype=torch.float32) * 3).to(dtype)
    logits[1, -1] = 20.0
    how = LIMITS_AT_LARGE_VOCABULARIES[V]
    assert sampled(fused, logits, 5, **how) == sampled(eager, logits, 5, **how)
    wte, wpe = values(V, 32, dtype=dtype), values(4, 32, dtype=dtype)
    ring = torch.tensor([[V - 1], [V // 2]], device=DEVICE)
    counts = torch.tensor([[1, 3], [1, 0]], device=DEVICE)
    found = fused.embed_tokens(ring, counts, wte, wpe)
    assert torch.equal(found, eager.embed_tokens(ring, counts, wte, wpe))


def test_all_tokens_of_a_large_vocabulary_can_be_sampled() -> None:
    """Equal logits give every token the same mass, so the token follows from the uniform number."""
    V, B = 50304, 5
    wanted = (eager.uniform(SEED, torch.full((B,), 7)) * V).long().tolist()
    for ops in (eager, fused):
        assert sampled(ops, torch.zeros(B, V), 7) == wanted


@pytest.mark.parametrize(
    ("temperature", "wanted"),
    [
        (1.0, [0.4, 0.3, 0.2, 0.1]),
        *((temperature, [1.0, 0.0, 0.0, 0.0]) for temperature in (0.0, 1e-8, 1e-300)),
        *((temperature, [0.25] * 4) for temperature in (1e9, 1e308)),
    ],
)
def test_samples_follow_the_probabilities(temperature: float, wanted: list[float]) -> None:
    # Five standard deviations of a share of 2,000 samples are at most 0.056.
    atol = 0.0 if 1.0 in wanted else 0.056
    share = shares(eager, LOGITS, temperature=temperature)
    torch.testing.assert_close(share, torch.tensor(wanted), atol=atol, rtol=0)
    rows = LOGITS.expand(40, -1)  # as many as the interpreter has time for
    first, second = (sampled(ops, rows, temperature=temperature) for ops in (eager, fused))
    assert first == second


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (1, None, 1),
        (2, None, 2),
        (4, None, 4),
        (5, None, 4),
        (None, 1e-9, 1),
        (None, 0.39, 1),
        (None, 0.41, 2),
        (None, 0.71, 3),
        (None, 1.0, 4),
        (2, 0.5, 1),  # of the two that are left, the first holds 0.57
        (2, 0.6, 2),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(top_k, top_p, kept: int) -> None:
    how = dict(top_k=top_k, top_p=top_p)
    share = shares(eager, LOGITS, 100, **how)
    assert (share > 0).tolist() == [i < kept for i in range(4)]
    rows = LOGITS.expand(4, -1)
    assert sampled(fused, rows, 9, **how) == sampled(eager, rows, 9, **how)


@each
def test_of_equal_logits_the_first_are_kept(ops) -> None:
    for how in (dict(top_k=2), dict(top_p=0.3)):
        assert (shares(ops, torch.zeros(6), 12, **how) > 0).tolist() == [True] * 2 + [False] * 4
    assert sampled(ops, torch.zeros(1, 6), temperature=0.0) == [0]


def test_equal_logits_before_a_likelier_one(monkeypatch) -> None:
    """In several blocks: some of the equal ones are kept, and a likelier one comes after them."""
    monkeypatch.setattr(decode_tokens, "MAX_BLOCK", 16)
    logits = torch.zeros(3, 40)
    logits[:, 39] = 2.0
    for how in (dict(top_k=3), dict(top_k=19), dict(top_p=0.5)):
        assert sampled(fused, logits, **how) == sampled(eager, logits, **how)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", [{}, dict(temperature=0.0), dict(top_k=2, top_p=0.5)], ids=str)
@each
def test_logits_that_are_not_finite_give_no_token(ops, how: dict, bad: float) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = bad
    found = sampled(ops, logits, **how)
    assert found[1] == -1
    assert min(found[0], found[2]) >= 0


@each
def test_a_sample_is_a_function_of_seed_sequence_and_number(ops) -> None:
    even = torch.zeros(5, 1000)
    first = sampled(ops, even)
    assert first == sampled(ops, even)
    assert first == sampled(ops, even, seed=torch.tensor(SEED, device=DEVICE))
    assert first[:2] == sampled(ops, even[:2])
    others = [sampled(ops, even, seed=SEED + 1), sampled(ops, even, seed=SEED + 2**32)]
    others += [sampled(ops, even, number) for number in (1, 2**32)]
    assert len(set(map(tuple, [first, *others]))) == 5
    assert len(set(first)) > 1


def test_uniform_numbers_are_uniform() -> None:
    number = torch.arange(20_000)
    u = eager.uniform(3, number)
    assert 0 <= u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * len(u))
    assert abs(float(u.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / len(u))


def test_the_first_and_the_last_token_can_be_sampled(monkeypatch) -> None:
    """The ends of the unit interval are the first and the last token of some mass."""
    for u, token in ((0.0, 1), (1 - 2**-53, 4)):
        monkeypatch.setattr(eager, "uniform", lambda *_, u=u: torch.tensor([u]).double())
        logits = torch.tensor([[-200.0, 0.0, 3.0, 0.0, 1.0, -200.0]])
        assert sampled(eager, logits.cpu()) == [token] if DEVICE == "cpu" else True


@each
def test_one_token_is_no_choice(ops) -> None:
    assert sampled(ops, torch.full((2, 1), 3.0), top_p=0.5) == [0, 0]


@each
def test_the_last_token_and_its_position_are_embedded(ops) -> None:
    wte, wpe = values(11, 24), values(9, 24, seed=1)
    ring = torch.tensor([[3, 4, 10, 7], [-1, 1, 2, 2**62], [5, 6, 0, 8]], device=DEVICE)
    counts = torch.tensor([[0, 3], [9, 8], [2, 0]], device=DEVICE)
    wanted = torch.stack([wte[7] + wpe[3], wte[0] + wpe[8], wte[6] + wpe[0]])
    assert torch.equal(ops.embed_tokens(ring, counts, wte, wpe), wanted)


def test_what_is_outside_the_tables_gives_nan() -> None:
    """The tables are parts of larger tensors, so that what lies outside could be read."""
    wte, wpe = values(9, 24)[:5], values(9, 24, seed=1)[2:6]
    ring = torch.tensor([[7], [5], [2**40], [4], [0], [1], [2], [-3]], device=DEVICE)
    positions = [0, 1, 2, 4, -1, 2**40, -(2**33), 3]
    counts = torch.tensor([[1, position, 0] for position in positions], device=DEVICE)
    found = fused.embed_tokens(ring, counts, wte, wpe)
    assert found[:7].isnan().all()
    assert torch.equal(found[7], wte[0] + wpe[3])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(temperature=-1.0), "temperature must be a finite number, 0 or above, got -1.0"),
        (dict(temperature=math.inf), "temperature must be a finite number"),
        (dict(temperature=math.nan), "temperature must be a finite number"),
        (dict(top_k=0), "top_k must be at least 1, got 0"),
        (dict(top_k=-1), "top_k must be at least 1, got -1"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
        (dict(top_p=math.nan, temperature=0.0), r"top_p must be in \(0, 1\], got nan"),
    ],
    ids=str,
)
@each
def test_options_without_a_meaning_are_refused(ops, how: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        sampled(ops, LOGITS.expand(2, -1), **how)


@each
def test_bad_seeds_and_vocabularies_are_refused(ops) -> None:
    with pytest.raises(TypeError, match=r"^seed must be an int or a 0-d int64 tensor, got None$"):
        sampled(ops, LOGITS[None], seed=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^seed must fit into a signed 64-bit integer"):
        sampled(ops, LOGITS[None], seed=2**63)
    for V, got in ((0, "0"), ((1 << 22) + 1, "4,194,305")):
        with pytest.raises(ValueError, match=f"^logits must have 1 to .* columns, got {got}$"):
            sampled(ops, torch.zeros(1, 1).expand(1, V) if V else torch.zeros(1, 0))
