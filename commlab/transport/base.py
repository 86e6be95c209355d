"""What a transport is: it moves bytes between two ranks, in order, without waiting. Everything above it is
schedules."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ..errors import UsageError

Bytes = npt.NDArray[np.uint8]
"""A contiguous 1-D uint8 view of somebody's memory; must stay alive and, for a send, unchanged until the request is
done."""


RECORD_BYTES = 8
"""The size of a record of the agreement check (:mod:`commlab.runtime.agreement`)."""

PIGGYBACK_BYTES = 32 * 1024
"""The most that travels with a record to each peer: a message that MPI still sends without asking the receiver first
(its eager limit), and room that every rank keeps for every other."""

PIGGYBACK_RANKS = 16
"""Among more ranks than these nothing travels with a record, because everybody sends to everybody."""


class Rows:
    """What has arrived with the records: a row of ``row_bytes`` per rank, the first at ``address``."""

    __slots__ = ("_bytes", "_views", "address", "row_bytes")

    def __init__(self, table: npt.NDArray[np.uint8]):
        """``table``: a row per rank, each contiguous."""
        self._bytes = torch.from_numpy(table)
        self._views: dict[torch.dtype, torch.Tensor] = {}
        self.address, self.row_bytes = self._bytes.data_ptr(), self._bytes.stride(0)

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        """All rows, to their ends, as numbers: shape (ranks, room)."""
        if dtype not in self._views:
            self._views[dtype] = self._bytes.view(dtype)
        return self._views[dtype]


class Piggyback:
    """Numbers that travel with a record: ``size_bytes`` at ``address``, which must stay as they are until the exchange
    is done. ``to_each``: the peers get consecutive shares of ``share_bytes`` each, of which the last ones may be short
    or empty (what arrives behind their ends means nothing); otherwise all peers get all of the numbers. ``rows``: once
    the exchange is done, what every rank has sent to this one, in rank order.
    """

    __slots__ = ("address", "rows", "share_bytes", "size_bytes", "to_each")

    rows: Rows

    def __init__(self, address: int, size_bytes: int, share_bytes: int, to_each: bool):
        self.address, self.size_bytes, self.share_bytes, self.to_each = address, size_bytes, share_bytes, to_each

    def share(self, rank: int) -> tuple[int, int]:
        """Where the share of ``rank`` begins, in bytes, and how many bytes it has."""
        start = min(rank * self.share_bytes, self.size_bytes)
        return start, min(self.share_bytes, self.size_bytes - start)


class Offload:
    """A whole operation of a group for a transport that moves it by itself, without Python: it announces the operation,
    compares the announcements, and moves and reduces the numbers.

    ``operand``: the native description of the buffer, and of what is done to its numbers. ``program``: the compiled
    schedule; or ``few``: (bytes to each peer, whether each gets another share) of numbers that travel with the
    announcement. ``keep``: the tensors that the native side reads and writes. ``bytes_sent``, ``messages_sent``: what
    this rank sends.
    """

    __slots__ = ("awaited", "bytes_sent", "few", "keep", "messages_sent", "operand", "program", "request")

    def __init__(
        self,
        operand: Any,
        keep: Any,
        program: Any = None,
        few: tuple[int, bool] | None = None,
        bytes_sent: int = 0,
        messages_sent: int = 0,
    ):
        self.operand, self.keep, self.program, self.few = operand, keep, program, few
        self.bytes_sent, self.messages_sent = bytes_sent, messages_sent
        self.awaited = False
        """The caller goes on to wait for it."""
        self.request: Request | None = None
        """Once it is under way."""


class Request(Protocol):
    """A message, or a set of them, on its way. It may also have ``block(timeout_s)``, where it knows a better way to
    wait than to be asked again and again."""

    def test(self) -> bool:
        """True once the message has arrived (receive) or its memory may be written again (send), and from then on.
        Never blocks. PeerLostError when the peer is gone."""

    def peers(self) -> Sequence[int]:
        """The ranks that have not done their part yet; for messages to the user."""


Pending: TypeAlias = Generator[Request, None, None]
"""A computation that yields the request it waits for, and goes on when that request has been completed."""


class Counts(NamedTuple):
    """What an operation has done on a rank."""

    bytes_sent: int = 0
    messages_sent: int = 0
    node_bytes_read: int = 0
    """In the window."""
    node_bytes_written: int = 0


class AtOnce(NamedTuple):
    """An operation as one native call, from the agreement check to the result: all that the call is
    given, but for where the numbers lie."""

    call: Callable[..., Any]
    """``call(hash of the signature, sequence, address, *arguments, patience_us)``: a key of :attr:`done` where it is
    done; else what tells how far it came."""
    arguments: tuple[Any, ...]
    resume: Callable[[Any, Any, int, Any, Any], Pending]
    """``resume(group, signature, sequence, what has the memory, what call has returned)``: the rest of the operation,
    from the agreement check on."""
    done: Mapping[Any, Counts]
    """What the operation has sent, read and written, by the way that it has gone."""


class Contexts:
    """The numbers by which this rank tells the messages of its transports apart. A new transport has the largest number
    that any of the ranks offers that it is split from, so no two transports that share two ranks ever have the same
    one. Numbers are not used again. ``limit``: the largest number that the transport can carry; half of the numbers are
    for what goes beside a transport (:meth:`Transport.beside`)."""

    def __init__(self, limit: int):
        self.offered, self._limit = 1, max(0, limit // 2 - 1)

    def beside(self, context: int) -> int:
        """The number of what goes beside the transport that has ``context``."""
        return self._limit + 1 + context

    def take(self, context: int, rank: int) -> None:
        """The ranks have agreed on ``context``. UsageError, on all of them, where the transport has no more numbers."""
        if context > self._limit:
            raise UsageError(
                f"rank {rank}: no more than {self._limit} sub-groups and parameter servers can be made over this "
                "transport in one run; keep those that are used again"
            )
        self.offered = max(self.offered, context + 1)


class Transport(Protocol):
    """Point-to-point between ``size`` ranks. Messages of one pair are matched in the order in which they were
    posted."""

    name: str
    rank: int
    size: int
    threads: bool
    """Whether a second thread of this process may call the transport."""

    piggyback_bytes: int
    """How many bytes may travel to each peer with a record of RECORD_BYTES; 0: none."""

    contexts: Contexts
    """Numbers for transports that are split from this one."""
    moves_itself: bool
    """Whether a thread of the transport's own moves everything on, and takes a :class:`Offload`: then it has
    ``launch(record, launch)``, which starts the operation behind those that were launched before (None: there is
    nothing behind the announcement), ``few`` and ``resumed`` for an :class:`AtOnce`, ``byte_s``, what a byte takes
    between two nodes, and ``programs``, a table for what was compiled."""

    def isend(self, data: Bytes, to: int) -> Request: ...

    def irecv(self, data: Bytes, frm: int) -> Request: ...

    def exchange(self, record: bytes, piggyback: Piggyback | None = None) -> Exchange:
        """Give every rank a record of the same length, and what it carries, and get everyone's. Collective. Ranks that
        carry different things find it out from their records."""

    def split(self, ranks: Sequence[int], context: int, *, any_order: bool = False) -> Transport | None:
        """A transport among ``ranks`` of this one, messages of which never meet the others': they carry the number
        ``context``, the largest that any rank's :attr:`contexts` offers. Every rank of this transport makes the call;
        nobody waits, and nothing is taken that would have to be given back. None on the ranks that are not in the list.
        ``any_order``: messages of different peers may come in another order than that in which they are waited for."""

    def beside(self) -> Transport:
        """A transport among the same ranks, messages of which never meet this one's, nor those of any that was split
        from it. Local, and the same one for every call, as far as peers can tell. UsageError where there is none."""

    def abort(self, code: int) -> None:
        """End the whole job."""

    def close(self, orderly: bool = True) -> None:
        """Release what the transport holds. The first transport of a job is closed on all ranks together; not
        ``orderly``: peers may be anywhere, and nobody waits for them."""


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
