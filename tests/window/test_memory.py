"""The window of two processes, made by hand: memory that ranks see, that is given out, and used again."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from window_pairs import by_hand, closed, descriptors, mappings, pair

from commlab.errors import SharedMemoryError
from commlab.window import area, memfd
from commlab.window.area import Place
from commlab.window.memory import Window, size_class

pytestmark = by_hand


def test_ranks_see_each_others_memory() -> None:
    first, second = pair()
    for size_bytes in (1, 64, 1000, 2**20, 9 * 2**20 + 5):
        mine, place = first.allocate(size_bytes)
        assert (mine.numel(), mine.data_ptr() % 64, int(mine.sum())) == (size_bytes, 0, 0)
        assert first.locate(mine) == place
        theirs = second.view(0, place, size_bytes)
        mine[-1] = 7
        assert theirs[-1] == 7
        theirs[0] = 9
        assert mine[0] == 9
        assert first.view(0, place, size_bytes).data_ptr() == mine.data_ptr()
        assert theirs.data_ptr() == second.address(0, place) != mine.data_ptr()
    closed(first, second)


def test_where_tensors_lie() -> None:
    first, second = pair()
    memory, place = first.allocate(4096)
    other, _ = first.allocate(4096)
    numbers = memory.view(torch.float32)
    assert first.locate(numbers[3:10]) == Place(place.segment, place.offset + 12)
    assert first.locate(numbers.view(32, 32)) == place
    assert first.locate(other) != place
    assert first.locate(torch.ones(5)) is None
    assert first.locate(torch.empty(0)) is None
    assert second.locate(memory) is None, "another rank's memory is not this one's"
    assert first.locate(second.view(0, place, 4)) is None
    closed(first, second)


def test_memory_is_reused() -> None:
    first, second = pair()
    places = []
    for turn in range(10):
        for size_bytes in (1000, 6 * 2**20, 12 * 2**20):
            memory, place = first.allocate(size_bytes)
            assert not memory.any(), "memory that was used before is zeroed again"
            memory.fill_(turn + 1)
            assert (second.view(0, place, size_bytes) == turn + 1).all(), "the peer sees the place's new content"
            places.append(place)
            first.free(memory)
    assert len(set(places)) == 3
    kept = [first.allocate(1000) for _ in range(2)]
    assert kept[0][1] == places[0] != kept[1][1]
    closed(first, second)


def test_sizes_that_vary_find_what_was_freed() -> None:
    """An ordinary tensor of another length in every call takes no segment of its own."""
    first, second = pair()
    places = set()
    for turn in range(60):
        size_bytes = 9 * 2**20 + 131071 * (turn * 37 % 60)
        assert size_bytes <= size_class(size_bytes) <= 1.125 * size_bytes
        memory, place = first.allocate(size_class(size_bytes))
        assert not memory[:: 2**16].any()
        memory.fill_(turn + 1)
        places.add(place)
        first.free(memory)
    assert len(places) <= 9, "8 sizes for each power of two"
    closed(first, second)


def test_many_small_tensors_share_segments() -> None:
    first, second = pair()
    before = descriptors()
    given = [first.allocate(100)[1] for _ in range(5000)]
    assert len(set(given)) == 5000
    assert len({place.segment for place in given}) == 1
    assert descriptors() == before + 1, "for the peers to open; a mapping holds none"
    closed(first, second)


def test_tensors_outlive_their_window() -> None:
    first, second = pair()
    mine, place = first.allocate(5000)
    theirs = second.view(0, place, 5000)
    mine.fill_(5)
    closed(first, second)
    closed(first)
    del first, second
    # The same memory, mapped twice: by its owner and by the peer.
    assert mappings() == 2
    theirs[17] = 6
    assert (int(mine[17]), int(mine.sum())) == (6, 5 * 5000 + 1)
    part = mine[10:20].clone()
    del mine
    assert mappings() == 1
    assert int(theirs[17]) == 6
    del theirs
    assert part.sum() == 51


def test_a_forgotten_window_leaves_nothing() -> None:
    pair()[0].allocate(100)


def test_missing_memory_is_an_error_and_no_sigbus(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair()

    def full(fd: int, offset: int, size_bytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        before = descriptors()
        with pytest.raises(SharedMemoryError, match="no 9 MiB of shared memory for segment 1: No space left on device"):
            first.allocate(9 * 2**20)
        with pytest.raises(SharedMemoryError, match="for control page"):
            Window(0, 2)
        assert descriptors() == before

    def none_left(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(os, "memfd_create", none_left)
        with pytest.raises(SharedMemoryError, match="no 0 MiB of shared memory for control page: Too many open files"):
            Window(0, 2)
    with monkeypatch.context() as patched:
        patched.setattr(memfd, "available_memory", lambda: (8 * 2**20, ""))
        with pytest.raises(SharedMemoryError, match="no 9 MiB of shared memory for segment 1: 8 MiB are left"):
            first.allocate(9 * 2**20)
    assert first.allocate(9 * 2**20)[0].numel() == 9 * 2**20, "and it can be had later"
    closed(first, second)


def test_there_is_an_end_to_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair()
    monkeypatch.setattr(area, "_ARENA_BYTES", 4096)
    monkeypatch.setattr(first.area, "_most", 8)
    for _ in range(7):
        first.allocate(4096)
    with pytest.raises(SharedMemoryError, match="8 segments, the most there can be; ask for fewer, larger tensors"):
        first.allocate(4096)
    closed(first, second)


def test_more_ranks_than_a_window_has_room_for() -> None:
    """B10: refused before anything is made, with the way out."""
    with pytest.raises(SharedMemoryError, match="a window has room for 512 ranks, and this node has 513; launch fewer"):
        Window(0, 513)
