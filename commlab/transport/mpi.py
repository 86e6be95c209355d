"""Transport over MPI (MPICH, Open MPI) through mpi4py: buffers only, never pickles, one duplicated communicator per
purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpi4py import MPI

from ..errors import PeerLostError
from .base import Bytes, Exchange


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
    """Records of one fixed width over persistent requests: two MPI calls however many ranks there are."""

    __slots__ = ("_comm", "_incoming", "_mine", "_requests")

    def __init__(self, comm: MPI.Comm, rank: int, size: int, width: int):
        import numpy as np

        self._comm, self.size = comm, size
        self._table = np.zeros((size, width), np.uint8)
        self._mine = self._table[rank]
        others = [(rank + shift) % size for shift in range(1, size)]
        # Tag 1: a record may be sent while the peer still waits for data of the operation before.
        self._incoming = [(peer, comm.Recv_init(self._table[peer], peer, 1)) for peer in others]
        self._requests = [request for _, request in self._incoming]
        self._requests += [comm.Send_init(self._mine, peer, 1) for peer in others]

    def start(self, record: bytes) -> MpiExchange:
        self._mine[:] = memoryview(record)
        try:
            MPI.Prequest.Startall(self._requests)
        except MPI.Exception as error:
            raise lost(_failed(self._comm), error) from error
        return self

    def test(self) -> bool:
        try:
            return MPI.Request.Testall(self._requests)
        except MPI.Exception as error:
            raise lost(_failed(self._comm), error) from error

    def peers(self) -> Sequence[int]:
        return [peer for peer, request in self._incoming if not request.Get_status()]

    def free(self) -> None:
        for request in self._requests:
            request.Free()


class MpiTransport:
    """Ranks of an MPI communicator; the communicator is duplicated, so the caller's own messages never meet ours."""

    name = "mpi"

    def __init__(self, comm: MPI.Comm | None = None, *, owned: bool = False):
        """``comm``: default COMM_WORLD. Collective over it. ``owned``: it was made for this transport, don't duplicate
        it."""
        comm = MPI.COMM_WORLD if comm is None else comm
        self._comm: Any = comm if owned else comm.Dup()
        # Errors must come back as exceptions that can name the peer, instead of ending the process.
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank, self.size = self._comm.rank, self._comm.size
        self.threads = MPI.Query_thread() >= MPI.THREAD_MULTIPLE
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

    def exchange(self, record: bytes) -> Exchange:
        width = len(record)
        if width > 64:
            return Exchange(self, record)
        if width not in self._exchanges:
            self._exchanges[width] = MpiExchange(self._comm, self.rank, self.size, width)
        return self._exchanges[width].start(record)

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
