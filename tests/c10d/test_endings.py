"""Barriers of torch.distributed that time out, in torch's words; ranks that leave without a word, or die."""

from __future__ import annotations

import os
import re
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import Forked, RankFailed

from commlab.errors import PeerLostError


def slow_barrier(rank: int, size: int) -> str:
    if rank == 0:
        started_s = time.monotonic()
        try:
            dist.barrier()
        except Exception as error:
            assert 0.9 < time.monotonic() - started_s < 5
            return str(error)
    time.sleep(1.5)
    return ""


def test_barrier_times_out_in_words(forked: Forked) -> None:
    """Trap 7: what torch's own tests look for in the message."""
    text = forked(slow_barrier, 2, silent_s=1.0)[0]
    assert re.search(" (Timed out|closed|timeout) ", text) and "rank 0" in text and "[1]" in text, text


def monitored(rank: int, size: int) -> str:
    """Trap 8: it insists on gloo's name; the group's own method does not."""
    group: Any = dist.group.WORLD
    group.monitored_barrier()
    if rank == 1:
        return ""
    try:
        group.monitored_barrier(timedelta(seconds=2), wait_all_ranks=True)
    except RuntimeError as error:
        return str(error)
    return "no error"


def no_time(rank: int, size: int) -> str:
    group: Any = dist.group.WORLD
    try:
        if rank == 0:
            group.monitored_barrier(timedelta(0))
    except RuntimeError as error:
        return str(error)
    return ""


def test_monitored_barrier_without_time(forked: Forked) -> None:
    assert "Rank 0 timed out in monitoredBarrier after 0 ms" in forked(no_time, 2)[0]


def test_monitored_barrier(forked: Forked) -> None:
    texts = forked(monitored, 3)
    assert "Ranks 1 failed to pass monitoredBarrier in 2000 ms" in texts[0]
    assert "Rank 2 successfully reached monitoredBarrier" in texts[2] and "[1]" in texts[2]


def leaves_without_a_word(rank: int, size: int) -> str:
    """Trap 9: nothing is destroyed, a future's thread was at work, gloo too."""
    group: Any = dist.group.WORLD
    assert group.group.size == size
    group._futures.threaded = True
    dist.all_reduce(torch.ones(70_000), async_op=True).get_future().wait()
    dist.all_reduce(torch.tensor([1]), dist.ReduceOp.BOR)
    return "left"


def test_exit_without_destroy(forked: Forked) -> None:
    assert forked(leaves_without_a_word, 3, whole_exit=True) == [("left", 0)] * 3


def dies(rank: int, size: int) -> float:
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        time.sleep(0.3)
        os._exit(0)
    started_s = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 1"):
        dist.all_reduce(torch.ones(1))
    return time.monotonic() - started_s - 0.3


def test_a_dead_peer_is_named(forked: Forked) -> None:
    with pytest.raises(RankFailed, match="rank 1: ended with 0, saying nothing") as found:
        forked(dies, 3)
    assert "rank 0" not in str(found.value).replace("rank 1: ended", "") and "rank 2" not in str(found.value)
