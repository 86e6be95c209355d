"""Transport over MPI (MPICH, Open MPI) through mpi4py: buffers only, never pickles, one duplicated communicator per
purpose."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import memmove
from typing import Any

from mpi4py import MPI

from ..errors import PeerLostError
from .base import PIGGYBACK_BYTES, PIGGYBACK_RANKS, RECORD_BYTES, Bytes, Exchange, Piggyback, Rows

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

    __slots__ = ("_comm", "_incoming", "_own", "_rank", "_ready", "_records", "_rows", "_staging", "_under_way")

    def __init__(self, comm: MPI.Comm, rank: int, size: int, width: int, room_bytes: int = 0):
        import numpy as np

        self._comm, self._rank, self.size = comm, rank, size
        self._table = np.zeros((size, width + room_bytes), np.uint8)
        self._staging = np.zeros((size, width + room_bytes), np.uint8)
        self._records, self._rows = self._table[:, :width], Rows(self._table[:, width:])
        self._own = memoryview(self._records[rank])
        others = [(rank + shift) % size for shift in range(1, size)]
        # Tag 1: a record may be sent while the peer still waits for data of the operation before.
        self._incoming = [(peer, comm.Recv_init(self._table[peer], peer, 1)) for peer in others]
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
            requests.append(self._comm.Send_init(source[peer if to_each else self._rank, :stop], peer, 1))
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

    def free(self) -> None:
        self._forget()
        for _, request in self._incoming:
            request.Free()


class MpiTransport:
    """Ranks of an MPI communicator; the communicator is duplicated, so the caller's own messages never meet ours."""

    name = "mpi"
    moves_itself = False

    def __init__(self, comm: MPI.Comm | None = None, *, owned: bool = False):
        """``comm``: default COMM_WORLD. Collective over it. ``owned``: it was made for this transport, don't duplicate
        it."""
        comm = MPI.COMM_WORLD if comm is None else comm
        self._comm: Any = comm if owned else comm.Dup()
        # Errors must come back as exceptions that can name the peer, instead of ending the process.
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank, self.size = self._comm.rank, self._comm.size
        self.threads = MPI.Query_thread() >= MPI.THREAD_MULTIPLE
        self.piggyback_bytes = PIGGYBACK_BYTES if 1 < self.size <= PIGGYBACK_RANKS else 0
        self._exchanges: dict[int, MpiExchange] = {}

    def isend(self, data: Bytes, to: int) -> MpiRequest:
        try:
            return MpiRequest(self._comm.Isend([data, MPI.BYTE], to, 0), to)
        except MPI.Exception as error:
            raise lost([to], error) from error

    def irecv(self, data: Bytes, frm: int) -> MpiRequest:
        try:
            return MpiRequest(self._comm.Irecv([data, MPI.BYTE], frm, 0), frm)
        except MPI.Exception as error:
            raise lost([frm], error) from error

    def exchange(self, record: bytes, piggyback: Piggyback | None = None) -> Exchange:
        width = len(record)
        if width > 64:
            return Exchange(self, record)
        if width not in self._exchanges:
            room_bytes = self.piggyback_bytes if width == RECORD_BYTES else 0
            self._exchanges[width] = MpiExchange(self._comm, self.rank, self.size, width, room_bytes)
        return self._exchanges[width].start(record, piggyback)

    def split(self, ranks: Sequence[int], *, any_order: bool = False) -> MpiTransport | None:
        color = 0 if self.rank in ranks else MPI.UNDEFINED
        comm = self._comm.Split(color, ranks.index(self.rank) if self.rank in ranks else 0)
        return MpiTransport(comm, owned=True) if color == 0 else None

    def abort(self, code: int) -> None:
        MPI.COMM_WORLD.Abort(code)

    def close(self) -> None:
        for exchange in self._exchanges.values():
            exchange.free()
        self._exchanges.clear()
        if not MPI.Is_finalized():
            self._comm.Free()


def library() -> str:
    """Name and version of the MPI library in use, for reports."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"
