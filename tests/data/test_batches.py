import math

import pytest
import torch

from irongpt.data.batches import Tokens, TrainBatches, evenly_spaced, every_target
from irongpt.errors import UserError

CONTEXT = 8


def train_batches(length: int = 200, batch_size: int = 4, seed: int = 1) -> TrainBatches:
    return TrainBatches(torch.arange(length), CONTEXT, batch_size, seed)


def test_targets_are_the_next_tokens():
    batches = train_batches()
    for number in range(50):
        x, y = batches(number)
        assert x.shape == y.shape == (4, CONTEXT)
        assert torch.equal(y, x + 1)
        assert torch.equal(x, x[:, :1] + torch.arange(CONTEXT))


@pytest.mark.parametrize("length", [9, 10, 16, 17, 24, 25, 200])
def test_an_epoch_has_no_token_twice_and_misses_less_than_two_sequences(length):
    batches = train_batches(length, batch_size=1)
    for epoch in range(5):
        first = epoch * batches.count
        targets = torch.cat([batches(first + i)[1][0] for i in range(batches.count)])
        assert len(targets.unique()) == len(targets)
        assert length - 1 - len(targets) < 2 * CONTEXT


def test_every_position_starts_a_sequence_and_every_token_is_a_target():
    batches = train_batches(100, batch_size=1)
    rows = [batches(i) for i in range(60 * batches.count)]
    assert {int(x[0, 0]) for x, _ in rows} == set(range(100 - CONTEXT))
    assert {int(t) for _, y in rows for t in y[0]} == set(range(1, 100))


def test_a_batch_depends_on_seed_and_number_alone():
    forward = [train_batches()(i)[0] for i in range(40)]
    batches = train_batches()
    backward = [batches(i)[0] for i in reversed(range(40))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    other = [train_batches(seed=1 + 2**30)(i)[0] for i in range(40)]
    assert not any(torch.equal(a, b) for a, b in zip(forward, other, strict=True))


def test_epochs_differ_in_order_and_offset():
    batches = train_batches(batch_size=train_batches().count)
    epochs = [batches(i)[0][:, 0] for i in range(8)]
    assert len({tuple(e.tolist()) for e in epochs}) == 8
    assert len({int(e[0]) % CONTEXT for e in epochs}) > 1


def test_the_split_is_contiguous_disjoint_and_nine_to_one():
    tokens = Tokens.of(torch.arange(1000))
    assert torch.equal(tokens.train, torch.arange(900))
    assert torch.equal(tokens.val, torch.arange(900, 1000))


@pytest.mark.parametrize("length", [0, 1, CONTEXT, CONTEXT + 1, 10 * CONTEXT])
def test_a_text_too_short_for_a_sequence_in_each_split_is_rejected(length):
    with pytest.raises(UserError, match=f"the corpus has {length:,} tokens"):
        Tokens.of(torch.arange(length)).check(CONTEXT)


def test_the_shortest_text_that_is_enough():
    tokens = Tokens.of(torch.arange(10 * CONTEXT + 1))
    tokens.check(CONTEXT)
    assert len(tokens.val) == CONTEXT + 1
    assert len(list(evenly_spaced(tokens.val, CONTEXT, 4, 100))) == 1
    assert TrainBatches(tokens.train, CONTEXT, 4, 1)(0)[0].shape == (4, CONTEXT)


def test_a_part_of_the_validation_sequences_is_spread_evenly():
    [(x, _)] = evenly_spaced(torch.arange(1000 * CONTEXT + 1), CONTEXT, 100, 10)
    assert torch.equal(x[:, 0], torch.arange(10) * 100 * CONTEXT)


@pytest.mark.parametrize("length", [2, 8, 9, 10, 16, 17, 18, 100])
def test_every_target_comes_once_and_in_order(length):
    batches = list(every_target(torch.arange(length), CONTEXT, batch_size=3))
    targets = torch.cat([y.flatten() for _, y in batches])
    assert targets.tolist() == list(range(1, length))
    assert all(torch.equal(y, x + 1) and len(x) <= 3 for x, y in batches)
    assert len(batches[0][0]) == min(3, max(1, (length - 1) // CONTEXT))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int64])
def test_ids_of_any_integer_dtype_give_the_same_batches(dtype):
    ids = torch.arange(200) + 65_000
    expected = TrainBatches(ids, CONTEXT, 4, seed=1)(3)
    found = TrainBatches(ids.to(dtype), CONTEXT, 4, seed=1)(3)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
        assert b.dtype == torch.int64


def test_bits_per_byte_of_one_text_and_of_documents():
    ids = torch.arange(100)
    text = Tokens(ids[:90], ids[90:], ids[89:90], val_bytes=20)
    assert text.val_targets == 10
    assert text.bits_per_byte(math.log(2)) == pytest.approx(10 / 20)
    documents = Tokens(ids[:90], ids[90:], ids[:0], val_bytes=18)
    assert documents.val_targets == 9  # all but the mark before the first document
    assert documents.bits_per_byte(2 * math.log(2)) == pytest.approx(1)
    assert math.isnan(Tokens.of(ids).bits_per_byte(1.0))
