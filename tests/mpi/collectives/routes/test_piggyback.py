"""Small allreduces between ranks that share no window: their numbers travel with the agreement check."""

from __future__ import annotations

import time

import pytest
import torch
from closed_form import DTYPES, expected, numbers, ops_for, same_bits
from mpi_groups import all_groups
from mpi_ranks import Ranks

import commlab
from commlab import native
from commlab.collectives.routes import piggyback
from commlab.errors import DisagreementError

pytestmark = pytest.mark.mpi(min_size=2)


def edges(size: int, itemsize: int) -> list[int]:
    """Numbers at which the way changes: to everyone, a part to each, not with the records any more; and between."""
    everything, parts = piggyback.EVERYTHING_BYTES // itemsize, 32 * 1024 // itemsize * size
    return [1, everything - 1, everything, everything + 1, everything + size + 1, parts - 1, parts, parts + 1]


@pytest.mark.parametrize("backend", ["built", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_at_every_edge(ranks: Ranks, dtype: torch.dtype, backend: str) -> None:
    """The data are exact in any order of adding, so every rank has the reference's bits, natively and with torch."""
    wrong = []
    with native.using("torch" if backend == "torch" else native.backends()[0]):
        for group in all_groups(ranks):
            for at, numel in enumerate(edges(group.size, dtype.itemsize)):
                op = ops_for(dtype)[at % len(ops_for(dtype))]
                got = commlab.allreduce(numbers(group.rank, numel, dtype, op), op, algorithm="direct", group=group)
                if not same_bits(got + 0, expected(op, group.size, numel, dtype) + 0):
                    wrong.append((group.size, op, numel))
    assert not wrong


def test_what_it_sends(ranks: Ranks) -> None:
    for group in all_groups(ranks):
        if group.size == 1:
            continue
        before = group.bytes_sent, group.messages_sent
        commlab.allreduce(torch.ones(1000), group=group, algorithm="direct")
        peers = group.size - 1
        assert (group.bytes_sent - before[0], group.messages_sent - before[1]) == (4000 * peers, peers)
        before = group.bytes_sent, group.messages_sent
        commlab.allreduce(torch.ones(1025), group=group, algorithm="direct")
        part_bytes = 4 * -(-1025 // group.size)
        assert (group.bytes_sent - before[0], group.messages_sent - before[1]) == (2 * part_bytes * peers, 2 * peers)


def test_a_late_rank_and_what_is_queued_behind(ranks: Ranks) -> None:
    """Whoever waits for long hands the operation over to the queue; operations of both kinds keep their order."""
    group = ranks.group(*range(ranks.size))
    assert group is not None
    for late in (0, group.size - 1):
        if group.rank == late:
            time.sleep(0.03)
        first = commlab.allreduce_async(
            numbers(group.rank, 3000, torch.float32), "sum", algorithm="direct", group=group
        )
        second = commlab.allreduce(numbers(group.rank, 9, torch.float32), "sum", algorithm="direct", group=group)
        third = commlab.allreduce_async(
            numbers(group.rank, 50_000, torch.float32), "sum", algorithm="ring", group=group
        )
        for got in (first.wait(), second, third.wait()):
            assert torch.equal(got, expected("sum", group.size, got.numel(), torch.float32))


@pytest.mark.parametrize("mine, theirs", [(10, 20_000), (2000, 1001), (100, 10**6)], ids=str)
def test_ranks_that_carry_different_lengths(ranks: Ranks, mine: int, theirs: int) -> None:
    """No message is too long for its receiver, all hear of it, nothing was reduced, and they can go on."""
    group = ranks.group(*range(ranks.size))
    assert group is not None
    numel = mine if group.rank else theirs
    given = numbers(group.rank, numel, torch.float32)
    with pytest.raises(DisagreementError, match=rf"float32\[{theirs}\].*float32\[{mine}\]"):
        commlab.allreduce(given, "sum", algorithm="direct", group=group)
    assert torch.equal(given, numbers(group.rank, numel, torch.float32))
    got = commlab.allreduce(numbers(group.rank, 1500, torch.float32), "sum", algorithm="direct", group=group)
    assert torch.equal(got, expected("sum", group.size, 1500, torch.float32))
