"""Ranks of torch.distributed end as they like, over links: without a word right after their last operation, which hurts
nobody; or killed in the middle of one, which all others learn."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bits import needs_native
from forked import Forked, RankFailed

from commlab.errors import PeerLostError
from commlab.transport.tcp import missing_reason

pytestmark = [needs_native, pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())]

LINKS = {"COMMLAB_WINDOW": "off", "COMMLAB_LINKS": "tcp"}


def last_operations(rank: int, size: int, last: str) -> float:
    """A few operations, ``last`` as the last of them. Who returns ends at once by ``os._exit()``."""
    group: Any = dist.group.WORLD
    assert group.group.links_reason == "links"
    assert group.group.transport._links.engine.keeper() > 0
    numels = {"few": 3, "shares": 10_000, "long": 300_000}
    total = torch.full((numels.get(last, 5),), float(rank + 1))
    dist.all_reduce(total)
    if last in numels:
        total = torch.full((numels[last],), float(rank + 1))
        dist.all_reduce(total)
        assert (total == size * (size + 1) / 2).all()
        return float(total[0])
    numbers = torch.full((50_000,), float(rank))
    if last == "broadcast":
        dist.broadcast(numbers, 1)
        assert (numbers == 1).all()
    elif last == "gathered":
        found = [torch.empty(50_000) for _ in range(size)]
        dist.all_gather(found, numbers)
        assert all((each == at).all() for at, each in enumerate(found))
    elif last == "scattered":
        share = torch.empty(20_000)
        dist.reduce_scatter_tensor(share, torch.ones(20_000 * size))
        assert (share == size).all()
    else:
        dist.barrier()
    return float(total[0])


@pytest.mark.parametrize("last", ["few", "shares", "long", "broadcast", "gathered", "scattered", "barrier"])
def test_ranks_that_end_right_after_their_last_operation(forked: Forked, last: str) -> None:
    """Kind: spawned processes, which end by os._exit(); a keeper closes their connections at once."""
    for size in (3, 5):
        assert forked(last_operations, size, environ=LINKS, arguments=(last,)) == [size * (size + 1) / 2] * size


def killed_in_the_middle(rank: int, size: int, victim: int) -> str:
    numbers = torch.ones(2_000_000)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    if rank == victim:
        dist.all_reduce(numbers, dist.ReduceOp.MAX, async_op=True)
        time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLostError, match=rf"\brank {victim}\b") as found:
        while True:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return str(found.value)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_by_all_others(forked: Forked, victim: int) -> None:
    """Kind: kill -9 in the middle of an operation. (How fast is measured by bench.death; no timing decides a test.)"""
    with pytest.raises(RankFailed) as found:
        forked(killed_in_the_middle, 4, environ=LINKS, arguments=(victim,))
    assert str(found.value) == f"rank {victim}: ended with -9, saying nothing"
