"""The window: memory shared by the ranks of a node. Not a transport: nobody sends, everyone reads.

Each rank owns its area: a control page (counters, what it is about to do, small payloads) and segments of data. They
are memfds: without a name, so they cannot leak, not bound by the size of /dev/shm, allocated before use, so memory that
is missing is an error here and not a SIGBUS later. Peers open them through /proc and check the owner's token before
they touch a byte, because in another PID namespace the same path can be a stranger's memory.
"""

from __future__ import annotations

import bisect
import mmap
import os
import secrets
import struct
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..native import library
from .memfd import Mapping, Unavailable, close_all, mapped, memfd

NOWHERE = 2**64 - 1
"""Segment number of an ordinary tensor."""

STAGING_BYTES = 4 * 2**20
"""Per rank: two blocks on their way in and two on their way out (kernels/cpu/piped.h)."""

_ARENA_BYTES = 16 * 2**20
_ALIGN_BYTES = 64
_CARD = struct.Struct("<qqq16s")


def size_class(size_bytes: int) -> int:
    """What to ask for where sizes vary from call to call, so that what was freed fits again: one of eight sizes for
    each power of two, an eighth more at most."""
    step = 1 << max(6, size_bytes.bit_length() - 4)
    return -(-max(1, size_bytes) // step) * step


class Place(NamedTuple):
    """Where data lie in a rank's area of the window; the peers know them by this, never by an address."""

    segment: int
    offset: int


class Window:
    """This rank's area and its view of the peers'. Made in three moves, all ranks together: this, then :meth:`open`
    with every rank's :meth:`card`, then :meth:`open_staging`."""

    def __init__(self, local_rank: int, local_size: int, spin_us: float):
        """Raises Unavailable. ``spin_us``: how long a waiting rank looks before it sleeps."""
        if library.built is None:
            raise Unavailable(f"the native module is missing ({library.missing_reason})")
        if not hasattr(library.built, "NodeSync"):
            raise Unavailable("the window needs Linux")
        self._native: Any = library.built
        self.rank, self.size = local_rank, local_size
        self._spin_us = spin_us
        self._token = secrets.token_bytes(16)
        self._fds: list[int] = []
        self._close = weakref.finalize(self, close_all, self._fds)
        self._control_fd, self._control = self._memory("control page", self._native.CONTROL_BYTES)
        self._native.format_page(self._control.address, local_rank, self._token)
        self._pids: list[int] = []
        self._segments: list[Mapping] = []
        self._starts: list[tuple[int, int]] = []
        """(address, segment) of this rank's segments, ascending."""
        self._theirs: dict[tuple[int, int], Mapping] = {}
        self._stagger = local_rank * max(_ALIGN_BYTES, mmap.PAGESIZE // local_size // _ALIGN_BYTES * _ALIGN_BYTES)
        self._stagger %= mmap.PAGESIZE
        """Where in a page this rank's data begin. Caches choose a line's set by its address within a page or so: if all
        ranks' began at the same, the loops that read them side by side would have them all in one set."""
        self._free: dict[int, list[Place]] = {}
        """Places given back, by size: the next request of that size gets them."""
        self._arena_used = _ARENA_BYTES
        self._arena = -1
        self.sync: Any = None
        self.staging: list[int] = []
        """Addresses of every rank's staging area."""

    def close(self) -> None:
        """Close the descriptors: from here on no peer can map this area. The memory itself goes with the last of its
        users: this window, peers that have mapped it, tensors that lie in it, operations under way. Not collective, but
        every rank must be through with its operations; a second call does nothing."""
        self._close()

    def _memory(self, name: str, size_bytes: int) -> tuple[int, Mapping]:
        """New memory: its descriptor, which peers open, and where it lies. Raises Unavailable, whatever the reason: a
        kernel without memfds, no memory, no descriptor left."""
        try:
            self._fds.append(memfd(name, size_bytes))
            return self._fds[-1], Mapping(self._fds[-1], size_bytes)
        except OSError as error:
            megabytes = f"{size_bytes / 2**20:.0f} MiB"
            raise Unavailable(f"no {megabytes} of shared memory for {name}: {error.strerror}") from error

    def card(self) -> bytes:
        """What peers need to find this rank's control page."""
        return _CARD.pack(os.getpid(), self._control_fd, self.size, self._token)

    def open(self, cards: Sequence[bytes]) -> None:
        """Map the peers' control pages. Raises Unavailable."""
        pages = []
        for peer, card in enumerate(cards):
            pid, fd, _, token = _CARD.unpack(card)
            self._pids.append(pid)
            mapping = self._control
            if peer != self.rank:
                mapping = mapped(pid, fd, self._native.CONTROL_BYTES, f"the control page of local rank {peer}")
                wrong = self._native.wrong_page(mapping.address, peer, token)
                if wrong:
                    raise Unavailable(
                        f"process {pid}, said to be local rank {peer}, shows {wrong}: ranks of "
                        "one host in several PID namespaces?"
                    )
                self._theirs[peer, NOWHERE] = mapping
            pages.append(mapping.address)
        self.sync = self._native.NodeSync(self.rank, pages, self._spin_us)
        self._new_segment(STAGING_BYTES)

    def open_staging(self) -> None:
        """Once every rank has returned from :meth:`open`: map the staging areas."""
        self.staging = [self.address(peer, Place(0, 0)) for peer in range(self.size)]

    def _new_segment(self, size_bytes: int) -> int:
        number = len(self._segments)
        if number >= self._native.MAX_SEGMENTS:
            raise Unavailable(
                f"this rank's window has {number} segments, the most there can be; ask for fewer, larger tensors"
            )
        fd, mapping = self._memory(f"segment {number}", size_bytes)
        self._segments.append(mapping)
        self.sync.add_segment(number, fd, size_bytes)
        bisect.insort(self._starts, (self._segments[-1].address, number))
        return number

    def allocate(self, size_bytes: int) -> tuple[torch.Tensor, Place]:
        """``size_bytes`` of this rank's area, zeroed, as a 1-D uint8 tensor, and where they lie. Not collective. Raises
        Unavailable when there is no memory."""
        rounded = self._rounded(size_bytes)
        if self._free.get(rounded):
            place = self._free[rounded].pop()
            self._segments[place.segment].bytes[place.offset : place.offset + size_bytes].zero_()
        elif rounded > _ARENA_BYTES // 2:
            pages = -(-(self._stagger + rounded) // mmap.PAGESIZE)
            place = Place(self._new_segment(pages * mmap.PAGESIZE), self._stagger)
        else:
            if self._arena_used + rounded > _ARENA_BYTES:
                self._arena, self._arena_used = self._new_segment(_ARENA_BYTES), self._stagger
            place = Place(self._arena, self._arena_used)
            self._arena_used += rounded
        return self._segments[place.segment].bytes[place.offset : place.offset + size_bytes], place

    @staticmethod
    def _rounded(size_bytes: int) -> int:
        return -(-max(1, size_bytes) // _ALIGN_BYTES) * _ALIGN_BYTES

    def free(self, tensor: torch.Tensor) -> None:
        """Give back what :meth:`allocate` gave; for tensors of the same size later on. Nobody may use it any more, on
        any rank."""
        if not tensor.numel():
            return  # it has no address to find it by
        place = self.locate(tensor)
        assert place is not None, "not of this window"
        self._free.setdefault(self._rounded(tensor.numel() * tensor.element_size()), []).append(place)

    def locate(self, tensor: torch.Tensor) -> Place | None:
        """Where the tensor's data lie in this rank's area; None for an ordinary tensor."""
        address = tensor.data_ptr()
        at = bisect.bisect_right(self._starts, (address, self._native.MAX_SEGMENTS)) - 1
        if at < 0:
            return None
        start, segment = self._starts[at]
        offset = address - start
        if offset + tensor.numel() * tensor.element_size() > self._segments[segment].size_bytes:
            return None
        return Place(segment, offset)

    def mappings(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The whole segments, as uint8, that these tensors of any rank lie in, as this process has mapped them."""
        found = {}
        for tensor in tensors:
            for mapping in (*self._segments, *self._theirs.values()):
                if 0 <= tensor.data_ptr() - mapping.address < mapping.size_bytes:
                    found[mapping.address] = mapping.bytes
        return list(found.values())

    def address(self, peer: int, place: Place) -> int:
        """The address, in this process, of a place in ``peer``'s area; mapped when first asked for."""
        if peer == self.rank:
            return self._segments[place.segment].address + place.offset
        mapping = self._theirs.get((peer, place.segment))
        if mapping is None:
            fd, size_bytes = self.sync.segment(peer, place.segment)
            mapping = mapped(self._pids[peer], fd, size_bytes, f"segment {place.segment} of local rank {peer}")
            self._theirs[peer, place.segment] = mapping
        return mapping.address + place.offset

    def view(self, peer: int, place: Place, size_bytes: int) -> torch.Tensor:
        """A place of ``peer``'s area as a 1-D uint8 tensor: the same memory in all ranks."""
        self.address(peer, place)
        mapping = self._segments[place.segment] if peer == self.rank else self._theirs[peer, place.segment]
        return mapping.bytes[place.offset : place.offset + size_bytes]

    def alive(self, peer: int) -> bool:
        """Whether ``peer``'s process still exists (a zombie no longer does)."""
        try:
            with open(f"/proc/{self._pids[peer]}/stat", "rb") as stat:
                return stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
        except OSError:
            return False
