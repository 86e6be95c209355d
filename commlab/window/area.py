"""A rank's own area: segments of shared memory, the places in them that somebody has, and what is given back."""

from __future__ import annotations

import bisect
import mmap
import os
import weakref
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import torch

from ..errors import SharedMemoryError
from .memfd import Mapping, close_all, memfd

NOWHERE = 2**64 - 1
"""Segment number of an ordinary tensor."""

STAGING = 0
"""Segment number of a rank's staging area."""

ALIGN_BYTES = 64
_ARENA_BYTES = 16 * 2**20


class Place(NamedTuple):
    """Where data lie in a rank's area of the window; the peers know them by this, never by an address."""

    segment: int
    offset: int


class Area:
    """Memory of ``owner`` (a word, with which its names begin). ``most_segments``: so many there can be at a time;
    ``stagger``: where in a page the data begin."""

    def __init__(self, owner: str, most_segments: int, stagger: int):
        self._owner, self._most, self._stagger = owner, most_segments, stagger
        self.sync: Any = None
        """The table in which peers find the segments (``NodeSync``); set before the first of them is made."""
        self.made: Callable[[int, int, int], object] = lambda segment, address, size_bytes: None
        """Called with each new segment."""
        self.given_back: Callable[[int], object] = lambda segment: None
        """Called with each segment that this rank has given back."""
        self._pid = os.getpid()
        self._fds: list[int] = []
        self.close = weakref.finalize(self, close_all, self._fds)
        """Close the descriptors: from then on no peer can map anything of this area. A second call does nothing."""
        self.segments: dict[int, Mapping] = {}
        """By their numbers (kernels/cpu/sync.h)."""
        self._segment_fds: dict[int, int] = {}
        self._next = STAGING + 1
        self._vacant: deque[int] = deque()
        """Numbers for the next segments, in places of the table that were given back."""
        self.starts: list[tuple[int, int]] = []
        """(address, number) of the segments, ascending."""
        self._free: dict[int, list[Place]] = {}
        """Places that nobody has, by size: the next request of that size gets them."""
        self._taken: Counter[int] = Counter()
        """By segment: how many places of it somebody has."""
        self._passing: dict[Place, object] = {}
        """The places that are given back once nobody has their tensors any more, each with a mark of its tensor."""
        self._dropped: deque[tuple[Place, object, int]] = deque()
        """Those that nobody has any more, each with the mark and the size."""
        self._freed: deque[tuple[Place, int]] = deque()
        self._sorting = Lock()
        self.arena_used = _ARENA_BYTES
        self._arena = -1
        self._arena_soiled = 0
        """Up to here the arena has been used before, and has to be zeroed."""

    def memory(self, name: str, size_bytes: int) -> tuple[int, Mapping]:
        """New memory: its descriptor, which peers open, and where it lies. Raises SharedMemoryError, whatever the
        reason: a kernel without memfds, no memory, no descriptor left."""
        try:
            fd = memfd(self._owner, name, size_bytes)
            self._fds.append(fd)
            return fd, Mapping(fd, size_bytes)
        except OSError as error:
            megabytes = f"{size_bytes / 2**20:.0f} MiB"
            raise SharedMemoryError(f"no {megabytes} of shared memory for {name}: {error.strerror}") from error

    def new_segment(self, size_bytes: int) -> int:
        """Raises SharedMemoryError."""
        number = self._vacant[0] if self._vacant else self._next
        if number >= self._most and not self._vacant:
            raise SharedMemoryError(
                f"this rank's window has {self._most} segments, the most there can be; ask for fewer, larger tensors"
            )
        self._make(number, size_bytes)
        if self._vacant:
            self._vacant.popleft()
        else:
            self._next += 1
        return number

    def new_staging(self, size_bytes: int) -> None:
        """Make segment STAGING. Raises SharedMemoryError."""
        with self._sorting:
            self._make(STAGING, size_bytes)

    def _make(self, number: int, size_bytes: int) -> None:
        fd, mapping = self.memory(f"segment {number}", size_bytes)
        self.segments[number], self._segment_fds[number] = mapping, fd
        self.made(number, mapping.address, size_bytes)
        self.sync.add_segment(number, fd, size_bytes)
        bisect.insort(self.starts, (mapping.address, number))

    def _give_back(self, number: int) -> None:
        """Nobody has anything of this segment any more: its memory goes once the peers have let go too."""
        self.sync.drop_segment(number)  # before the descriptor may mean something else
        self.given_back(number)  # before its addresses may
        mapping, fd = self.segments.pop(number), self._segment_fds.pop(number)
        self.starts.remove((mapping.address, number))
        self._forget_places(number)
        del self._taken[number]
        # The place in the table is used again, never the number: peers may still have the old memory mapped.
        self._vacant.append(number + self._most)
        if fd in self._fds:  # not once the window is closed
            self._fds.remove(fd)
            os.close(fd)

    def _forget_places(self, number: int) -> None:
        for places in self._free.values():
            places[:] = [place for place in places if place.segment != number]

    def allocate(self, size_bytes: int, kept: bool) -> tuple[torch.Tensor, Place]:
        """See :meth:`commlab.window.memory.Window.allocate`."""
        with self._sorting:
            tensor, place = self._allocate(size_bytes, kept)
        self._sort_dropped()
        return tensor, place

    def _allocate(self, size_bytes: int, kept: bool) -> tuple[torch.Tensor, Place]:
        self._sort_all()
        rounded = _rounded(size_bytes)
        used_before = bool(self._free.get(rounded))
        if used_before:
            place = self._free[rounded].pop()
        elif rounded > _ARENA_BYTES // 2:
            pages = -(-(self._stagger + rounded) // mmap.PAGESIZE)
            place = Place(self.new_segment(pages * mmap.PAGESIZE), self._stagger)
        else:
            if self.arena_used + rounded > _ARENA_BYTES:
                self._arena, self.arena_used = self.new_segment(_ARENA_BYTES), self._stagger
                self._arena_soiled = 0
            place = Place(self._arena, self.arena_used)
            self.arena_used += rounded
            used_before = place.offset < self._arena_soiled
        self._taken[place.segment] += 1
        dropped = None
        if not kept and size_bytes:
            mark = self._passing[place] = object()
            dropped = partial(_drop, weakref.ref(self), place, mark, rounded)
        tensor = self.segments[place.segment].tensor(place.offset, size_bytes, dropped)
        if used_before:
            tensor.zero_()
        return tensor, place

    def free(self, place: Place, size_bytes: int) -> None:
        """The place may be given out again, to a tensor of the same size."""
        self._passing.pop(place, None)
        self._freed.append((place, _rounded(size_bytes)))

    def drop(self, place: Place, mark: object, rounded: int) -> None:
        """Nobody has the tensor of this mark any more. Garbage is collected at any moment, in any thread: in the middle
        of any of these methods too."""
        if os.getpid() != self._pid:
            return  # a child of fork: the memory is its parent's
        self._dropped.append((place, mark, rounded))
        self._sort_dropped()

    def _sort_dropped(self) -> None:
        """Give back what nobody has any more. Where that is under way already, it is left to whoever does it, or to the
        next call."""
        while self._dropped and self._sorting.acquire(blocking=False):
            try:
                self._sort_all()
            finally:
                self._sorting.release()

    def _sort_all(self) -> None:
        while self._freed:
            place, rounded = self._freed.popleft()
            self._taken[place.segment] -= 1
            self._free.setdefault(rounded, []).append(place)
        while self._dropped:
            place, mark, rounded = self._dropped.popleft()
            if self._passing.get(place) is not mark:
                continue  # it was freed
            del self._passing[place]
            self._taken[place.segment] -= 1
            if self._taken[place.segment]:
                self._free.setdefault(rounded, []).append(place)
            elif place.segment != self._arena:
                self._give_back(place.segment)
            else:
                self._forget_places(self._arena)
                self._arena_soiled = max(self._arena_soiled, self.arena_used)
                self.arena_used = self._stagger


def _rounded(size_bytes: int) -> int:
    return -(-max(1, size_bytes) // ALIGN_BYTES) * ALIGN_BYTES


def _drop(area: weakref.ref[Area], place: Place, mark: object, rounded: int) -> None:
    found: Any = area()
    if found is not None:
        found.drop(place, mark, rounded)
