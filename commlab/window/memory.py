"""The window: memory shared by the ranks of a node. Not a transport: nobody sends, everyone reads.

Each rank owns its area: a control page (counters, what it is about to do, small payloads) and segments of data. They
are memfds: without a name, so they cannot leak, not bound by the size of /dev/shm, allocated before use and sealed, so
memory that is missing is an error here and not a SIGBUS later. Peers open them through /proc and check the owner's
token before they touch a byte, because in another PID namespace the same path can be a stranger's memory.
"""

from __future__ import annotations

import bisect
import mmap
import os
import secrets
import struct
import threading
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..errors import SharedMemoryError
from ..native import library
from .area import ALIGN_BYTES, NOWHERE, STAGING, Area, Place
from .memfd import Mapping, mapped, opened, require_memory

BLOCK_BYTES: int = getattr(library.built, "BLOCK_BYTES", 0)
"""A rank's block of an ordinary tensor that passes the staging areas (kernels/cpu/piped.h)."""

STAGING_BYTES: int = getattr(library.built, "STAGING_BYTES", 0)
"""Of a rank that needs it: two blocks on their way in and two on their way out (kernels/cpu/piped.h), and two rooms
(kernels/cpu/node_collective.h)."""

ROOM_BYTES: int = getattr(library.built, "ROOM_BYTES", 0)
"""What a room holds: numbers that are reduced all at once, and not block by block."""

_CARD = struct.Struct("<qqq16s")


def size_class(size_bytes: int) -> int:
    """What to ask for where sizes vary from call to call, so that what was freed fits again: one of eight sizes for
    each power of two, an eighth more at most."""
    step = 1 << max(6, size_bytes.bit_length() - 4)
    return -(-max(1, size_bytes) // step) * step


class Window:
    """This rank's area and its view of the peers'. Made in two moves, all ranks together: this, and :meth:`open` with
    every rank's :meth:`card`; then no rank may give up before all have opened it (:mod:`.opening`)."""

    def __init__(self, local_rank: int, local_size: int):
        """Raises SharedMemoryError, also where there is no memory for what the first large operation will need."""
        if library.built is None:
            raise SharedMemoryError(f"the native module is missing ({library.missing_reason})")
        if not hasattr(library.built, "NodeSync"):
            raise SharedMemoryError("the window needs Linux")
        self._native: Any = library.built
        if local_size > self._native.MAX_RANKS:
            raise SharedMemoryError(
                f"a window has room for {self._native.MAX_RANKS} ranks, and this node has {local_size}; launch fewer "
                "ranks on each host, or declare smaller nodes (nodes=)"
            )
        self.rank, self.size = local_rank, local_size
        require_memory(self._native.CONTROL_BYTES + STAGING_BYTES, "the window of this rank")
        self._token = secrets.token_bytes(16)
        # Where in a page this rank's data begin. Caches choose a line's set by its address within a page or so: if all
        # ranks' began at the same, the loops that read them side by side would have them all in one set.
        stagger = local_rank * max(ALIGN_BYTES, mmap.PAGESIZE // local_size // ALIGN_BYTES * ALIGN_BYTES)
        self.mapped: Any = self._native.Mappings(local_size, local_rank)
        """The segments that this process has mapped, where native code finds them."""
        self.area = Area(_tag(self._token), self._native.MAX_SEGMENTS, stagger % mmap.PAGESIZE)
        self.area.made = partial(self.mapped.add, local_rank)
        """This rank's own."""
        self.area.given_back = partial(_given_back, weakref.ref(self))
        self._control_fd, self._control = self.area.memory("control page", self._native.CONTROL_BYTES)
        self._native.format_page(self._control.address, local_rank, self._token)
        self._pids: list[int] = []
        self._tokens: list[bytes] = []
        self._theirs: dict[tuple[int, int], Mapping] = {}
        self.sync: Any = None
        self.has_staging = False
        """Whether this rank has a staging area that peers can find."""
        self._making = threading.Lock()

    def close(self) -> None:
        """Close the descriptors: from here on no peer can map this area. The memory itself goes with the last of its
        users: this window, peers that have mapped it, tensors that lie in it, operations under way. Not collective, but
        every rank must be through with its operations; a second call does nothing."""
        self.area.close()

    @property
    def page(self) -> int:
        """The address of this rank's control page."""
        return self._control.address

    def card(self) -> bytes:
        """What peers need to find this rank's control page."""
        return _CARD.pack(os.getpid(), self._control_fd, self.size, self._token)

    def open(self, cards: Sequence[bytes], spin_us: float) -> None:
        """Map the peers' control pages. ``spin_us``: how long a waiting rank looks before it sleeps. Raises
        SharedMemoryError."""
        pages = []
        for peer, card in enumerate(cards):
            pid, fd, _, token = _CARD.unpack(card)
            self._pids.append(pid)
            self._tokens.append(token)
            mapping = self._control
            if peer != self.rank:
                mapping = self._control_page(peer, pid, fd, token)
                self._theirs[peer, NOWHERE] = mapping
            pages.append(mapping.address)
        self.sync = self._native.NodeSync(self.rank, pages, spin_us)
        self.area.sync = self.sync

    def _control_page(self, peer: int, pid: int, fd: int, token: bytes) -> Mapping:
        """``peer``'s control page, mapped once its head has been read and is the right one."""
        what = f"the control page of local rank {peer}"
        mine = opened(pid, fd, self._native.CONTROL_BYTES, what)
        head = torch.frombuffer(bytearray(os.pread(mine, self._native.HEADER_BYTES, 0)), dtype=torch.uint8)
        wrong = self._native.wrong_page(head.data_ptr(), peer, token)
        if wrong:
            os.close(mine)
            raise SharedMemoryError(
                f"process {pid}, said to be local rank {peer}, shows {wrong}: ranks of one host in several PID "
                "namespaces?"
            )
        return mapped(mine, self._native.CONTROL_BYTES, f"{what} of process {pid}")

    def make_staging(self) -> None:
        """Give this rank its staging area, if it has none yet; before it publishes an operation whose numbers may pass
        there. Not with the window: most groups exchange little, and 5 MiB take a millisecond. Raises
        SharedMemoryError."""
        if self.has_staging:
            return
        with self._making:
            if not self.has_staging:
                self.area.new_staging(STAGING_BYTES)
                self.has_staging = True

    def staging_of(self, peer: int) -> int:
        """The address of ``peer``'s staging area. Only once ``peer`` has made it, and told so; and for the first time
        before this rank arrives again, because a peer whose last operation it is may end then."""
        return self.address(peer, Place(STAGING, 0))

    def meet(self, signature: int, sequence: int, address: int, timeout_us: float) -> bool:
        """Publish the record of an operation without numbers; whether all ranks have arrived within ``timeout_us``, and
        agree. The call of an :class:`..transport.base.AtOnce`."""
        return bool(self.sync.meet(signature, sequence, timeout_us))

    def let_go(self) -> None:
        """Unmap what the peers have given back. Cost: next to nothing; not collective."""
        for peer, number in list(self._theirs):
            if number != NOWHERE and not self.sync.segment(peer, number)[1]:
                self.mapped.drop(peer, number)
                self._theirs.pop((peer, number), None)

    def allocate(self, size_bytes: int, kept: bool = True) -> tuple[torch.Tensor, Place]:
        """``size_bytes`` of this rank's area, zeroed, as a 1-D uint8 tensor with a storage of its own, and where they
        lie. Not collective. ``kept``: until :meth:`free`; else until nobody has the tensor, or a view of it, any more.
        That is soon enough: an operation on the tensor has it, and ends on all ranks together. Raises
        SharedMemoryError when there is no memory."""
        self.let_go()
        return self.area.allocate(size_bytes, kept)

    def free(self, tensor: torch.Tensor) -> None:
        """Give back what :meth:`allocate` gave; for tensors of the same size later on. Nobody may use it any more, on
        any rank."""
        if not tensor.numel():
            return  # it has no address to find it by
        place = self.locate(tensor)
        assert place is not None, "not of this window"
        self.area.free(place, tensor.numel() * tensor.element_size())

    def locate(self, tensor: torch.Tensor) -> Place | None:
        """Where the tensor's data lie in this rank's area; None for an ordinary tensor."""
        starts, address = self.area.starts, tensor.data_ptr()
        at = bisect.bisect_right(starts, (address, NOWHERE)) - 1
        if at < 0:
            return None
        start, segment = starts[at]
        place = Place(segment, address - start)
        end = place.offset + tensor.numel() * tensor.element_size()
        return place if end <= self.area.segments[segment].size_bytes else None

    def mappings(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The whole segments, as uint8, that these tensors of any rank lie in, as this process has mapped them."""
        found = {}
        for tensor in tensors:
            for mapping in (*self.area.segments.values(), *self._theirs.values()):
                if 0 <= tensor.data_ptr() - mapping.address < mapping.size_bytes:
                    found[mapping.address] = mapping.bytes
        return list(found.values())

    def address(self, peer: int, place: Place) -> int:
        """The address, in this process, of a place in ``peer``'s area; mapped when first asked for."""
        if peer == self.rank:
            return self.area.segments[place.segment].address + place.offset
        return self._mapping(peer, place.segment).address + place.offset

    def _mapping(self, peer: int, number: int) -> Mapping:
        if peer == self.rank:
            return self.area.segments[number]
        mapping = self._theirs.get((peer, number))
        if mapping is None:
            self.let_go()
            fd, size_bytes = self.sync.segment(peer, number)
            what = f"segment {number} of local rank {peer}"
            if not size_bytes:
                raise SharedMemoryError(f"{what} was given back while this rank still needs it")
            mine = opened(self._pids[peer], fd, size_bytes, what, _tag(self._tokens[peer]))
            mapping = self._theirs[peer, number] = mapped(mine, size_bytes, f"{what} of process {self._pids[peer]}")
            self.mapped.add(peer, number, mapping.address, size_bytes)
        return mapping

    def view(self, peer: int, place: Place, size_bytes: int) -> torch.Tensor:
        """A place of ``peer``'s area as a 1-D uint8 tensor with a storage of its own: the same memory in all ranks."""
        return self._mapping(peer, place.segment).tensor(place.offset, size_bytes)

    def alive(self, peer: int) -> bool:
        """Whether ``peer``'s process still exists (a zombie no longer does)."""
        try:
            with open(f"/proc/{self._pids[peer]}/stat", "rb") as stat:
                return stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
        except OSError:
            return False


def _tag(token: bytes) -> str:
    """How the names of a window's memory begin: a peer sees from the name alone whose memory it is."""
    return token[:8].hex()


def _given_back(window: weakref.ref[Window], segment: int) -> None:
    found = window()
    if found is not None:
        found.mapped.drop(found.rank, segment)
        found.let_go()
