"""The opening of a window among threads that stand for the ranks of a node: one exchange, all ranks or none, and the
memory it takes."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bits import needs_native

from commlab.errors import SharedMemoryError
from commlab.window.area import STAGING
from commlab.window.memory import STAGING_BYTES, Window
from commlab.window.opening import Opening, open_together

pytestmark = [
    needs_native,
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the window needs Linux"),
    pytest.mark.usefixtures("small_heap"),
]

Outcome = tuple[Window | None, str]


class Node:
    """Threads, one for each rank, that open a window together."""

    def __init__(self, size: int):
        self.size, self.exchanges = size, 0
        self._meeting, self._told = threading.Barrier(size, timeout=20), [b""] * size

    def gather(self, rank: int, data: bytes, name: str) -> list[bytes]:
        self._told[rank] = data
        if self._meeting.wait() == 0:
            self.exchanges += 1
        found = list(self._told)
        self._meeting.wait()
        return found

    def open(self) -> list[Outcome]:
        found: list[Outcome] = [(None, "has not ended")] * self.size

        def rank_of(rank: int) -> None:
            found[rank] = open_together(rank, self.size, 0.0, lambda *told: self.gather(rank, *told), arrived)

        threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return found


def arrived(window: Window) -> None:
    stop_s = time.monotonic() + 10
    while window.sync.lagging() >= 0:
        assert time.monotonic() < stop_s, "ranks wait for each other"
        window.sync.wait(1e4)


def left_behind() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("memfd:commlab")


@pytest.mark.parametrize("size", [2, 3, 5])
def test_one_exchange_opens_a_window(size: int) -> None:
    """new_group + first operation <= 5 ms: the cards travel once, the rest is said in the control pages."""
    before = left_behind()
    node = Node(size)
    found = node.open()
    assert [reason for _, reason in found] == [""] * size
    assert node.exchanges == 1
    windows = [window for window, _ in found if window is not None]
    assert [window.rank for window in windows] == list(range(size))
    assert left_behind() == (before[0] + size, before[1] + size * size), "a control page each, mapped by all"
    for window in windows:
        window.close()
    del windows, window, found
    assert left_behind() == before


def test_a_staging_area_is_made_when_it_is_needed() -> None:
    """new_group + first operation <= 5 ms: 4 MiB are not made for a group that exchanges little; what is allocated
    before them keeps its number."""
    (first, _), (second, _) = Node(2).open()
    assert first is not None and second is not None
    mine, place = first.allocate(1000)
    assert place.segment != STAGING
    before = left_behind()
    for window in (first, second, first):
        window.make_staging()
    assert left_behind()[0] == before[0] + 2
    addresses = [[window.staging_of(peer) for peer in range(2)] for window in (first, second)]
    assert len({address for each in addresses for address in each}) == 4, "two areas, as both ranks see them"
    assert first.area.segments[STAGING].size_bytes == STAGING_BYTES
    mine.fill_(3)
    assert (second.view(0, place, 1000) == 3).all()
    assert first.locate(mine) == place
    first.close()
    second.close()


Failing = Callable[[Window], None]


@pytest.mark.parametrize("failing", [(0,), (2,), (0, 1), (0, 1, 2)])
def test_a_rank_that_cannot_map_a_page(failing: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever fails, all ranks are without a window, know the reason of the lowest of those, and keep nothing."""
    before, really = left_behind(), Window.open

    def open_(window: Window, cards: list[bytes], spin_us: float) -> None:
        if window.rank in failing:
            time.sleep(0.02 * window.rank)
            raise SharedMemoryError(f"rank {window.rank} sees no page")
        really(window, cards, spin_us)

    monkeypatch.setattr(Window, "open", open_)
    node = Node(3)
    assert node.open() == [(None, f"rank {failing[0]} sees no page")] * 3
    assert node.exchanges == 2
    assert left_behind() == before


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_has_no_memory(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said with the cards: one exchange."""
    before, really = left_behind(), Window.__init__

    def init(window: Window, local_rank: int, local_size: int) -> None:
        if local_rank == failing:
            raise SharedMemoryError("no memory")
        really(window, local_rank, local_size)

    monkeypatch.setattr(Window, "__init__", init)
    node = Node(3)
    assert node.open() == [(None, "no memory")] * 3
    assert node.exchanges == 1
    assert left_behind() == before


def test_a_wait_that_is_given_up_keeps_nothing() -> None:
    """A peer that never comes: the wait raises, and nothing is left."""
    before = left_behind()
    here, there = Opening(0, 2), Opening(1, 2)

    def tired(window: Window) -> None:
        assert window.sync.lagging() == 1
        raise TimeoutError

    with pytest.raises(TimeoutError):
        here.conclude([here.card, there.card], 0.0, lambda *_: [], tired)
    there.give_up()
    assert left_behind() == before
