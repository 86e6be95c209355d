"""Transport ``torch`` between two threads of one process: patience, contexts, and what is left of a dropped group."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch.distributed as dist

from commlab.errors import UsageError
from commlab.transport.torchdist import TorchTransport


@pytest.fixture
def pair() -> Iterator[list[TorchTransport]]:
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda rank: TorchTransport(store, rank, 2, timeout_s=1.0), range(2)))
    yield made
    for transport in made:
        transport.close()


def test_a_peer_that_computes_for_long_is_not_lost(pair: list[TorchTransport]) -> None:
    """B4: longer than the time-out with which the ranks were connected; who is silent is decided by whoever waits."""
    incoming, outgoing = np.zeros(3, np.uint8), np.arange(3, dtype=np.uint8)
    received = pair[0].irecv(incoming, 1)
    until_s = time.monotonic() + 2.5
    while time.monotonic() < until_s:
        received.block(0.1)
        assert not received.test()
    pair[1].isend(outgoing, 0)
    received.block(10)
    assert received.test()
    assert (incoming == outgoing).all()


def test_messages_of_sub_groups_do_not_meet(pair: list[TorchTransport]) -> None:
    """B15: all groups share connections; their messages are told apart, whatever the order in which they are sent."""
    first, second = ([transport.split((1, 0), context) for transport in pair] for context in (1, 2))
    data = [np.full(1000, value, np.uint8) for value in (1, 2, 3)]
    landing = [np.zeros(1000, np.uint8) for _ in data]
    # A sub-group's rank 1 is rank 0 of the whole.
    receives = [
        pair[0].irecv(landing[0], 1),
        first[0].irecv(landing[1], 0),  # type: ignore[union-attr]
        second[0].irecv(landing[2], 0),  # type: ignore[union-attr]
    ]
    sends = [
        second[1].isend(data[2], 1),  # type: ignore[union-attr]
        first[1].isend(data[1], 1),  # type: ignore[union-attr]
        pair[1].isend(data[0], 0),
    ]
    for request in (*receives, *sends):
        request.block(10)
        assert request.test()
    assert all((got == sent).all() for got, sent in zip(landing, data, strict=True))


def test_a_dropped_sub_group_leaves_no_thread(pair: list[TorchTransport]) -> None:
    """B15: 1,000 of them would leave 2,000."""
    before = threading.active_count()
    for context in range(1, 21):
        made = [transport.split((0, 1), context) for transport in pair]
        landing = np.zeros(8, np.uint8)
        received = made[0].irecv(landing, 1)  # type: ignore[union-attr]
        made[1].isend(np.ones(8, np.uint8), 0).block(10)  # type: ignore[union-attr]
        received.block(10)
        assert received.test()
        del made
    gc.collect()
    until_s = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until_s:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_sub_group_of_a_closed_transport(pair: list[TorchTransport]) -> None:
    """B17: its messages are refused."""
    made = pair[0].split((0, 1), 1)
    for transport in pair:
        transport.close()
    assert made is not None
    with pytest.raises(UsageError, match="was shut down"):
        made.isend(np.ones(8, np.uint8), 1)
    with pytest.raises(UsageError, match="no more than"):
        pair[0].split((0, 1), 2**31)
