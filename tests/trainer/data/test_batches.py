"""Samples and their order: every token predicted once, every sample dealt once, whatever the number of ranks."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commlab.errors import UsageError
from commlab.trainer.data.batches import IGNORED, BatchSampler, Blocks, held_out_batches

ranks = st.integers(1, 17)
deals = st.fixed_dictionaries(
    {
        "num_samples": st.integers(1, 300),
        "batch_size": st.integers(1, 70),
        "size": ranks,
        "grad_accumulation": st.integers(1, 5),
        "seed": st.integers(0, 2**32 - 1),
    }
).filter(lambda deal: deal["batch_size"] <= deal["num_samples"])


def epoch_of(sampler: BatchSampler, epoch: int) -> list:
    return list(islice(sampler.batches(epoch * sampler.steps_per_epoch), sampler.steps_per_epoch))


@given(deals, st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_sample_once_per_epoch_in_singles_order(deal: dict, epoch: int) -> None:
    size, pieces = deal.pop("size"), deal.pop("grad_accumulation")
    single = epoch_of(BatchSampler(**deal), epoch)
    assert sorted(np.concatenate([batch.samples for batch in single])) == list(range(deal["num_samples"]))
    shares = [
        epoch_of(BatchSampler(**deal, rank=rank, size=size, grad_accumulation=pieces), epoch) for rank in range(size)
    ]
    for index, batch in enumerate(single):
        assert (batch.epoch, batch.step) == (epoch, epoch * len(single) + index)
        assert np.array_equal(batch.micro_batches[0], batch.samples)
        parts = [share[index].micro_batches for share in shares]
        assert all(len(part) == pieces for part in parts), "ranks must run the same number of micro-batches"
        assert np.array_equal(np.concatenate([piece for part in parts for piece in part]), batch.samples)
        counts = [sum(map(len, part)) for part in parts]
        assert max(counts) - min(counts) <= 1
        assert all(share[index].step == batch.step for share in shares)


def test_last_batch_is_smaller_and_leaves_ranks_without_samples() -> None:
    last = [epoch_of(BatchSampler(18, 8, rank=rank, size=4, grad_accumulation=2), 0)[-1] for rank in range(4)]
    assert [sum(map(len, batch.micro_batches)) for batch in last] == [1, 1, 0, 0]
    assert all(len(batch.micro_batches) == 2 and len(batch.samples) == 2 for batch in last)


@given(deals, st.integers(0, 500))
@settings(max_examples=50, deadline=None)
def test_step_is_the_whole_cursor(deal: dict, start_step: int) -> None:
    start_step %= 3 * (1 + deal["num_samples"] // deal["batch_size"])
    sampler = BatchSampler(**deal)
    whole = islice(sampler.batches(), start_step, start_step + 5)
    resumed = islice(sampler.batches(sampler.start_step(sampler.state_dict(start_step))), 5)
    for expected, got in zip(whole, resumed, strict=True):
        assert (expected.epoch, expected.step) == (got.epoch, got.step)
        assert np.array_equal(expected.samples, got.samples)


def test_epochs_and_seeds_are_dealt_in_different_orders() -> None:
    orders = [
        tuple(np.concatenate([batch.samples for batch in epoch_of(BatchSampler(50, 7, seed=seed), epoch)]))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_order_is_the_same_for_ever() -> None:
    first = next(iter(BatchSampler(10, 10, seed=3).batches())).samples
    assert first.tolist() == [9, 1, 0, 8, 2, 4, 3, 5, 7, 6], "a resumed run must see the order its first half saw"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_samples": 31, "batch_size": 32}, ["31 samples", "batch of 32", "--batch-size"]),
        ({"num_samples": 9, "batch_size": 0}, ["batch_size", "at least 1", "got 0"]),
        ({"num_samples": 9, "batch_size": 1, "grad_accumulation": 0}, ["grad_accumulation", "at least 1"]),
        ({"num_samples": 9, "batch_size": 1, "rank": 2, "size": 2}, ["0..1", "got 2"]),
    ],
)
def test_sampler_refuses(arguments: dict, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        BatchSampler(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_sampler_refuses_to_resume_another_deal() -> None:
    state = BatchSampler(100, 8, seed=1).state_dict(5)
    with pytest.raises(UsageError, match="batch_size 8, this run 16"):
        BatchSampler(100, 16, seed=1).start_step(state)


@given(st.integers(2, 400), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_every_token_but_the_first_is_predicted_once(num_tokens: int, seq_len: int) -> None:
    tokens = np.arange(1, num_tokens + 1, dtype=np.uint16)  # all different, and none of them the padding
    blocks = Blocks(tokens, seq_len)
    everything = np.arange(len(blocks))
    input_ids, labels, count = blocks.batch(everything)
    kept = labels != IGNORED
    assert input_ids.shape == labels.shape == (len(blocks), seq_len)
    assert sorted(labels[kept].tolist()) == list(range(2, num_tokens + 1))
    assert (input_ids[kept] == labels[kept] - 1).all(), "a label is the token after its input"
    assert count == blocks.token_count(everything) == int(kept.sum()) == num_tokens - 1
    # Only the tail of the last sample is padded, and what it reads there is the padding.
    assert kept[:-1].all()
    assert (kept[-1].int().diff() <= 0).all()
    inside = (num_tokens - 1) % seq_len or seq_len
    assert (input_ids[-1, inside + 1 :] == 0).all()


@given(st.integers(2, 200), st.integers(1, 30), st.data())
@settings(max_examples=50, deadline=None)
def test_counts_of_any_samples(num_tokens: int, seq_len: int, data: st.DataObject) -> None:
    token_bytes = np.arange(num_tokens) % 5
    blocks = Blocks(np.arange(1, num_tokens + 1), seq_len, token_bytes=token_bytes)
    indices = np.array(data.draw(st.lists(st.integers(0, len(blocks) - 1))), np.int64)
    _, labels, count = blocks.batch(indices)
    predicted = labels[labels != IGNORED].numpy()
    assert blocks.token_count(indices) == count == len(predicted)
    assert blocks.byte_count(indices) == token_bytes[predicted - 1].sum()


def test_no_samples_make_an_empty_batch() -> None:
    blocks = Blocks(np.arange(10), 4)
    input_ids, labels, count = blocks.batch(np.array([], np.int64))
    assert input_ids.shape == labels.shape == (0, 4)
    assert count == blocks.token_count(np.array([], np.int64)) == 0


def test_blocks_refuse() -> None:
    with pytest.raises(UsageError, match="1 tokens are too few"):
        Blocks(np.zeros(1, np.uint8), 4)
    with pytest.raises(UsageError, match="--seq-len 0"):
        Blocks(np.zeros(9, np.uint8), 0)
    with pytest.raises(UsageError, match="token_bytes"):
        Blocks(np.zeros(9, np.uint8), 4).byte_count(np.array([0]))


@given(st.integers(2, 500), st.integers(1, 20), ranks, st.none() | st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_ranks_share_the_held_out_samples(num_tokens: int, batch_size: int, size: int, limit: int | None) -> None:
    blocks = Blocks(np.arange(1, num_tokens + 1), 7, token_bytes=np.ones(num_tokens, np.int32))

    def predicted(rank: int, size: int) -> list[int]:
        batches = list(held_out_batches(blocks, batch_size, rank=rank, size=size, limit=limit))
        assert all(0 < len(labels) <= max(1, batch_size // size) for _, labels, _ in batches)
        for _, labels, byte_count in batches:
            assert byte_count == int((labels != IGNORED).sum())
        return [token for _, labels, _ in batches for token in labels[labels != IGNORED].tolist()]

    single = predicted(0, 1)
    assert [token for rank in range(size) for token in predicted(rank, size)] == single
    if limit is None:
        assert single == list(range(2, num_tokens + 1))
    else:
        samples = sorted({(token - 2) // 7 for token in single})
        assert len(samples) == min(len(blocks), limit * batch_size)
        gaps = np.diff([*samples, len(blocks)])  # evenly spaced: gaps differ by one at most
        assert gaps.max() - gaps.min() <= 1
