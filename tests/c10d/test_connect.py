"""How a group of torch.distributed is opened: threads of one process are the members, and share a store in memory."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bits import needs_native

import commlab
from commlab.c10d.connect import Member, connect
from commlab.errors import PeerTimeoutError, SharedMemoryError
from commlab.transport.torchstore import StoreTransport
from commlab.window.memory import Window

pytestmark = [needs_native, pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the window needs Linux")]


def on_members(size: int, body: Callable[[int], Any]) -> list[Any]:
    """``body(rank)`` in a thread per member: what it returned, or raised."""
    found: list[Any] = ["has not ended"] * size

    def run(rank: int) -> None:
        try:
            found[rank] = body(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the members have exchanged through the store: the words of each exchange, once for each member."""
    found: list[str] = []
    really = StoreTransport.gather

    def gather(transport: StoreTransport, data: bytes, name: str) -> list[bytes]:
        found.append(name)
        return really(transport, data, name)

    monkeypatch.setattr(StoreTransport, "gather", gather)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_one_exchange_opens_a_group(size: int, exchanges: list[str]) -> None:
    """new_group + first operation <= 5 ms: the members speak once through the store, then in the window."""
    store = dist.HashStore()

    def body(rank: int) -> float:
        group = connect(store, rank, size, 20.0, Member(rank, size))
        assert group.window is not None, group.window_reason
        got = commlab.allreduce(torch.full((3,), float(rank + 1)), "sum", group=group)
        large = commlab.allreduce(torch.full((50_000,), float(rank + 1)), "sum", group=group)
        group.window.close()
        assert (large == got[0]).all()
        return float(got[0])

    assert on_members(size, body) == [size * (size + 1) / 2] * size
    assert exchanges == ["the members' addresses"] * size


@pytest.mark.parametrize("failing", [0, 1])
def test_a_member_that_can_have_no_window(failing: int, exchanges: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All members get messages instead, and the reason of the one that failed."""
    store, really = dist.HashStore(), Window.open

    def open_(window: Window, cards: list[bytes], spin_us: float) -> None:
        if window.rank == failing:
            raise SharedMemoryError("no page is seen")
        really(window, cards, spin_us)

    monkeypatch.setattr(Window, "open", open_)
    monkeypatch.setenv("COMMLAB_LINKS", "gloo")

    def body(rank: int) -> tuple[str, float]:
        group = connect(store, rank, 2, 20.0, Member(rank, 2))
        assert group.window is None
        total = commlab.allreduce(torch.full((3,), float(rank + 1)), "sum", group=group)
        return group.window_reason, float(total[0])

    assert on_members(2, body) == [("no page is seen", 3.0)] * 2
    assert exchanges == ["the members' addresses"] * 2 + ["reasons against a window"] * 2


def test_a_member_that_does_not_come_is_named() -> None:
    """Through the store before its card is there, and in the window after that."""
    store = dist.HashStore()
    with pytest.raises(PeerTimeoutError, match=r"rank 0 has waited 0 s for ranks \[1\] in the members' addresses"):
        connect(store, 0, 2, 0.3, Member(0, 2))

    def body(rank: int) -> object:
        return connect(later, rank, 2, 0.5, Member(rank, 2))

    later, really = dist.HashStore(), Window.open

    def stuck(window: Window, cards: list[bytes], spin_us: float) -> None:
        if window.rank == 1:
            time.sleep(2)
            raise KeyError("never mind")
        really(window, cards, spin_us)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Window, "open", stuck)
        found = on_members(2, body)
    assert isinstance(found[0], PeerTimeoutError), found
    words = r"rank 0 has waited \d\.\d s for rank 1 in the opening of a window; it may be stuck"
    assert re.match(words, str(found[0])), found[0]
