"""What a transport is: it moves bytes between two ranks, in order, without waiting. Everything above it is
schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
"""A contiguous 1-D uint8 view of somebody's memory; must stay alive and, for a send, unchanged until the request is
done."""


class Request(Protocol):
    """A message, or a set of them, on its way. It may also have ``block(timeout_s)``, where it knows a better way to
    wait than to be asked again and again."""

    def test(self) -> bool:
        """True once the message has arrived (receive) or its memory may be written again (send), and from then on.
        Never blocks. PeerLostError when the peer is gone."""

    def peers(self) -> Sequence[int]:
        """The ranks that have not done their part yet; for messages to the user."""


class Transport(Protocol):
    """Point-to-point between ``size`` ranks. Messages of one pair are matched in the order in which they were
    posted."""

    name: str
    rank: int
    size: int
    threads: bool
    """Whether a second thread of this process may call the transport."""

    def isend(self, data: Bytes, to: int) -> Request: ...

    def irecv(self, data: Bytes, frm: int) -> Request: ...

    def exchange(self, record: bytes) -> Exchange:
        """Give every rank a record of the same length and get everyone's. Collective."""

    def split(self, ranks: Sequence[int], *, any_order: bool = False) -> Transport | None:
        """A transport among ``ranks`` of this one, messages of which never meet the others'. Collective over this
        transport; None on the ranks that are not in the list. ``any_order``: messages of different peers may come in
        another order than that in which they are waited for."""

    def abort(self, code: int) -> None:
        """End the whole job."""

    def close(self) -> None:
        """Release what the transport holds. Collective where the library underneath wants it so."""


class Exchange:
    """Everyone's records by plain messages: P - 1 sends and receives of ``len(record)`` bytes per rank, one round trip.

    Not a tree on purpose: a rank that does not answer is then known by name to all the others.
    """

    __slots__ = ("_receives", "_sends", "_table", "size")

    def __init__(self, transport: Transport, record: bytes):
        rank, self.size = transport.rank, transport.size
        width = len(record)
        self._table = np.empty((self.size, width), np.uint8)
        self._table[rank] = np.frombuffer(record, np.uint8)
        others = [(rank + shift) % self.size for shift in range(1, self.size)]
        self._receives = [(peer, transport.irecv(self._table[peer], peer)) for peer in others]
        self._sends = [(peer, transport.isend(self._table[rank], peer)) for peer in others]

    def test(self) -> bool:
        self._receives = [(peer, request) for peer, request in self._receives if not request.test()]
        self._sends = [(peer, request) for peer, request in self._sends if not request.test()]
        return not self._receives and not self._sends

    def peers(self) -> Sequence[int]:
        return sorted({peer for peer, _ in self._receives} or {peer for peer, _ in self._sends})

    def agreed(self, record: bytes) -> bool:
        """Whether everyone's record equals ``record``; only after :meth:`test` has said True."""
        return self._table.tobytes() == record * self.size

    def records(self) -> list[bytes]:
        """Everyone's record in rank order; only after :meth:`test` has said True."""
        return [row.tobytes() for row in self._table]
