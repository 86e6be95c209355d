"""Transport over MPI (MPICH, Open MPI) through mpi4py: buffers only, never pickles.

One communicator serves all groups: MPI has room for about 2,000 only, and to give one back is collective. The messages
of a group carry its context in their tags."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from ctypes import memmove
from typing import Any

import numpy as np

from ..errors import PeerLostError, PeerTimeoutError, UsageError
from .base import PIGGYBACK_BYTES, PIGGYBACK_RANKS, RECORD_BYTES, Bytes, Contexts, Exchange, Piggyback, Rows
from .finalize import MPI

_LENGTHS = 64
"""Of different lengths, so many sets of sends are kept ready."""


def lost(peers: Sequence[int], error: MPI.Exception) -> PeerLostError:
    which = f"rank{'s' if len(peers) > 1 else ''} {', '.join(map(str, peers))}" if peers else "a peer"
    return PeerLostError(f"MPI lost {which}: {error}")


def _failed(comm: MPI.Comm) -> Sequence[int]:
    """The ranks that MPI knows to have failed, if it keeps such a list (ULFM)."""
    try:
        gone = comm.Get_failed()
        return list(gone.Translate_ranks(None, comm.Get_group()))
    except (MPI.Exception, NotImplementedError, AttributeError):
        return ()


class _Shared:
    """What all transports of this process that are split from one another share."""

    def __init__(self, comm: Any):
        self.comm = comm
        largest: int = comm.Get_attr(MPI.TAG_UB)
        self.contexts = Contexts(largest // 2 - 1)
        self.against = ""
        """Why no more messages can be sent; empty as long as they can."""
        self.left: list[tuple[list[MPI.Prequest], object]] = []
        """Persistent requests of transports that nobody has any more, and their memory: to be freed where MPI may be
        called."""
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self.against = "this process was forked from a rank, and is none itself"

    def unusable(self) -> UsageError:
        """The error for a message that can't be sent."""
        return UsageError(self.against or "MPI was finalized (MPI_Finalize): nothing can be sent any more")

    def free_left(self) -> None:
        """Free the requests of transports that are gone. Local. Those that are under way keep their memory: a peer may
        still send."""
        if self.left and not self.against and not MPI.Is_finalized():
            left, self.left[:] = self.left[:], []
            for requests, memory in left:
                if all(request.Test() for request in requests):
                    for request in requests:
                        request.Free()
                else:
                    self.left.append((requests, memory))


def finish(request: MPI.Request, timeout_s: float) -> None:
    """Return once ``request`` is done; PeerTimeoutError after ``timeout_s``. Patient: for set-up, not for data."""
    since_s = time.perf_counter()
    while not request.Test():
        waited_s = time.perf_counter() - since_s
        if waited_s > timeout_s:
            raise PeerTimeoutError(f"MPI has waited {waited_s:.1f} s for all ranks")
        time.sleep(min(1e-3, waited_s / 10))


def _duplicate(comm: MPI.Comm, timeout_s: float) -> MPI.Comm:
    made, request = comm.Idup()
    finish(request, timeout_s)
    return made


class MpiRequest:
    __slots__ = ("_peer", "_request")

    def __init__(self, request: MPI.Request, peer: int):
        self._request, self._peer = request, peer

    def test(self) -> bool:
        try:
            return self._request.Test()
        except MPI.Exception as error:
            raise lost([self._peer], error) from error

    def peers(self) -> Sequence[int]:
        return (self._peer,)


class MpiExchange(Exchange):
    """Records of one fixed width over persistent requests: two MPI calls however many ranks there are.

    Behind its record a rank may send up to ``room_bytes`` to each peer. Receives always have that room, so ranks that
    disagree about what travels are found by their records, and no message is too long for its receiver.
    """

    __slots__ = (
        "_comm",
        "_incoming",
        "_left",
        "_own",
        "_rank",
        "_ranks",
        "_ready",
        "_records",
        "_rows",
        "_staging",
        "_tag",
        "_under_way",
    )

    def __init__(self, shared: _Shared, ranks: Sequence[int], rank: int, tag: int, width: int, room_bytes: int = 0):
        """``ranks``: of the communicator, by rank of the group, in which this one is ``rank``."""
        comm, size = shared.comm, len(ranks)
        self._comm, self._ranks, self._rank, self.size, self._tag = comm, ranks, rank, size, tag
        self._left = shared.left
        self._table = np.zeros((size, width + room_bytes), np.uint8)
        self._staging = np.zeros((size, width + room_bytes), np.uint8)
        self._records, self._rows = self._table[:, :width], Rows(self._table[:, width:])
        self._own = memoryview(self._records[rank])
        others = [(rank + shift) % size for shift in range(1, size)]
        # A tag of its own: a record may be sent while the peer still waits for data of the operation before.
        self._incoming = [(peer, comm.Recv_init(self._table[peer], ranks[peer], tag)) for peer in others]
        self._ready: dict[tuple[bool, int], list[MPI.Prequest]] = {}
        self._under_way: list[MPI.Prequest] = []

    def start(self, record: bytes, piggyback: Piggyback | None = None) -> MpiExchange:
        self._own[:] = record
        key = (False, 0)
        if piggyback is not None:
            self._load(piggyback)
            key = piggyback.to_each, piggyback.share_bytes
        self._under_way = self._ready.get(key) or self._prepare(*key)
        try:
            MPI.Prequest.Startall(self._under_way)
        except MPI.Exception as error:
            raise lost(_failed(self._comm), error) from error
        return self

    def _load(self, piggyback: Piggyback) -> None:
        """Copy what is carried behind the records that will be sent."""
        piggyback.rows, row_bytes = self._rows, self._rows.row_bytes
        mine = self._rows.address + self._rank * row_bytes
        if not piggyback.to_each:
            memmove(mine, piggyback.address, piggyback.size_bytes)
            return
        self._staging[:, : len(self._own)] = self._records[self._rank]
        staging = self._staging.ctypes.data + len(self._own)
        for peer in range(self.size):
            start, size_bytes = piggyback.share(peer)
            to = mine if peer == self._rank else staging + peer * row_bytes
            memmove(to, piggyback.address + start, size_bytes)

    def _prepare(self, to_each: bool, share_bytes: int) -> list[MPI.Prequest]:
        """The receives, and the sends of one length; kept for the next time."""
        if len(self._ready) >= _LENGTHS:
            self._forget()
        source, stop = self._staging if to_each else self._table, len(self._own) + share_bytes
        requests = [request for _, request in self._incoming]
        for peer, _ in self._incoming:
            part = source[peer if to_each else self._rank, :stop]
            requests.append(self._comm.Send_init(part, self._ranks[peer], self._tag))
        self._ready[to_each, share_bytes] = requests
        return requests

    def test(self) -> bool:
        try:
            return MPI.Request.Testall(self._under_way)
        except MPI.Exception as error:
            raise lost(_failed(self._comm), error) from error

    def peers(self) -> Sequence[int]:
        return [peer for peer, request in self._incoming if not request.Get_status()]

    def agreed(self, record: bytes) -> bool:
        return self._records.tobytes() == record * self.size

    def records(self) -> list[bytes]:
        return [row.tobytes() for row in self._records]

    def _forget(self) -> None:
        for requests in self._ready.values():
            for request in requests[len(self._incoming) :]:
                request.Free()
        self._ready.clear()

    def __del__(self) -> None:
        # No MPI call here: any thread may be the one that drops this, also in a forked child.
        if hasattr(self, "_under_way"):
            requests = [request for _, request in self._incoming]
            for ready in self._ready.values():
                requests += ready[len(self._incoming) :]
            self._left.append((requests, (self._table, self._staging)))


class MpiTransport:
    """Ranks of an MPI communicator; the communicator is duplicated, so the caller's own messages never meet ours."""

    name = "mpi"
    moves_itself = False

    def __init__(self, comm: MPI.Comm | None = None, *, owned: bool = False, timeout_s: float = math.inf):
        """``comm``: default COMM_WORLD. Collective over it. ``owned``: it was made for this transport, don't duplicate
        it. PeerTimeoutError where not all ranks have come within ``timeout_s``."""
        if MPI.Is_finalized():
            raise UsageError("MPI was finalized (MPI_Finalize), and can't be started again in this process")
        comm = MPI.COMM_WORLD if comm is None else comm
        mine: Any = comm if owned else _duplicate(comm, timeout_s)
        # Errors must come back as exceptions that can name the peer, instead of ending the process.
        mine.Set_errhandler(MPI.ERRORS_RETURN)
        self._begin(_Shared(mine), range(mine.size), mine.rank, 0)

    def _begin(self, shared: _Shared, ranks: Sequence[int], rank: int, context: int) -> None:
        self._shared, self._comm, self._ranks, self._context = shared, shared.comm, ranks, context
        self.rank, self.size = rank, len(ranks)
        # Of data; records have the next one.
        self._tag = 2 * context
        self.contexts = shared.contexts
        self.threads = MPI.Query_thread() >= MPI.THREAD_MULTIPLE
        self.piggyback_bytes = PIGGYBACK_BYTES if 1 < self.size <= PIGGYBACK_RANKS else 0
        self._exchanges: dict[int, MpiExchange] = {}

    def isend(self, data: Bytes, to: int) -> MpiRequest:
        if self._shared.against or MPI.Is_finalized():
            raise self._shared.unusable()
        try:
            return MpiRequest(self._comm.Isend([data, MPI.BYTE], self._ranks[to], self._tag), to)
        except MPI.Exception as error:
            raise lost([to], error) from error

    def irecv(self, data: Bytes, frm: int) -> MpiRequest:
        if self._shared.against or MPI.Is_finalized():
            raise self._shared.unusable()
        try:
            return MpiRequest(self._comm.Irecv([data, MPI.BYTE], self._ranks[frm], self._tag), frm)
        except MPI.Exception as error:
            raise lost([frm], error) from error

    def exchange(self, record: bytes, piggyback: Piggyback | None = None) -> Exchange:
        width = len(record)
        if width > 64:
            return Exchange(self, record)
        if self._shared.against or MPI.Is_finalized():
            raise self._shared.unusable()
        if width not in self._exchanges:
            room_bytes = self.piggyback_bytes if width == RECORD_BYTES else 0
            self._exchanges[width] = MpiExchange(self._shared, self._ranks, self.rank, self._tag + 1, width, room_bytes)
        return self._exchanges[width].start(record, piggyback)

    def split(self, ranks: Sequence[int], context: int, *, any_order: bool = False) -> MpiTransport | None:
        self.contexts.take(context, self.rank)
        self._shared.free_left()
        if self.rank not in ranks:
            return None
        made = MpiTransport.__new__(MpiTransport)
        made._begin(self._shared, [self._ranks[rank] for rank in ranks], list(ranks).index(self.rank), context)
        return made

    def beside(self) -> MpiTransport:
        made = MpiTransport.__new__(MpiTransport)
        made._begin(self._shared, self._ranks, self.rank, self.contexts.beside(self._context))
        return made

    def abort(self, code: int) -> None:
        if self._shared.against or MPI.Is_finalized():
            os._exit(code)
        MPI.COMM_WORLD.Abort(code)

    def close(self, orderly: bool = True) -> None:
        self._exchanges.clear()
        self._shared.free_left()
        if self._context == 0 and not self._shared.against:
            self._shared.against = "the group of all ranks was shut down"
            if orderly and not MPI.Is_finalized():
                self._comm.Free()


def library() -> str:
    """Name and version of the MPI library in use, for reports."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"
