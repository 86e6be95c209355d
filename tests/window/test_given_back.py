"""The window of two processes, made by hand: memory that is dropped is given back once, by the process that made it,
and not while somebody uses it."""

from __future__ import annotations

import gc
import os
import warnings

import pytest
from window_pairs import by_hand, closed, descriptors, mappings, pair

from commlab.errors import SharedMemoryError
from commlab.window.area import Place

pytestmark = by_hand


def test_what_is_dropped_is_given_back() -> None:
    """B9: 12 tensors, dropped one after the other, leave no segment, descriptor or mapping; so do small ones, and a
    view keeps the memory."""
    first, second = pair()
    before = descriptors(), mappings()
    for turn in range(12):
        for size_bytes in (9 * 2**20, 7 * 2**20, 1000):
            tensor, place = first.allocate(size_bytes, kept=False)
            assert not tensor.any(), "zeroed, whatever lay there before"
            tensor.fill_(turn + 1)
            assert int(second.view(0, place, size_bytes)[-1]) == turn + 1
            del tensor
        second.let_go()
        gc.collect()
        assert descriptors() <= before[0] + 1, "but for the arena of small tensors"
        assert mappings() <= before[1] + 2
    tensor, place = first.allocate(9 * 2**20, kept=False)
    part = tensor[5:10].view(5, 1)
    del tensor
    assert first.locate(part) == Place(place.segment, place.offset + 5)
    del part
    assert place.segment not in first.area.segments
    closed(first, second)


def test_a_number_never_names_other_memory() -> None:
    """B9: a peer that has the old memory mapped does not take it for the new one in the same place of the table."""
    first, second = pair()
    seen = set()
    for turn in range(5):
        tensor, place = first.allocate(9 * 2**20, kept=False)
        tensor.fill_(turn + 1)
        seen.add(place.segment)
        assert int(second.view(0, place, 10)[3]) == turn + 1
        del tensor
        second.let_go()
        with pytest.raises(SharedMemoryError, match=r"segment \d+ of local rank 0 was given back"):
            second.view(0, place, 10)
    assert len(seen) == 5
    assert len({number % first._native.MAX_SEGMENTS for number in seen}) == 1
    closed(first, second)


def test_dropped_and_freed_once_only() -> None:
    """B9: memory that was freed by hand is not given back again when its tensor goes."""
    first, second = pair()
    tensor, place = first.allocate(5000, kept=False)
    first.free(tensor)
    again, same = first.allocate(5000, kept=False)
    assert same == place
    del tensor
    another, elsewhere = first.allocate(5000, kept=False)
    assert elsewhere != place
    again.fill_(1)
    assert not another.any()
    closed(first, second)


def test_a_child_of_fork_gives_nothing_back() -> None:
    """B9: the memory is the parent's, and the parent goes on with it."""
    first, second = pair()
    tensor, place = first.allocate(9 * 2**20, kept=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        del tensor
        os._exit(0)
    os.waitpid(pid, 0)
    assert first.sync.segment(0, place.segment)[1] == 9 * 2**20
    closed(first, second)


def test_tensors_that_are_saved_own_their_memory() -> None:
    """B8: two tensors of one segment, each with a storage of its own size."""
    first, second = pair()
    for size_bytes in (296, 12 * 2**20):
        tensor, place = first.allocate(size_bytes)
        assert tensor.untyped_storage().nbytes() == size_bytes
        assert second.view(0, place, size_bytes).untyped_storage().nbytes() == size_bytes
    closed(first, second)
