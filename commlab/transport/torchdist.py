"""Transport over torch.distributed's gloo: works under mpirun and under torchrun, needs no MPI. Slower per message than
MPI. All groups share the connections of the first one; the messages of a group carry its context as their tag."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from ..errors import PeerLostError, UsageError
from .base import Bytes, Contexts, Exchange, Piggyback

PATIENCE = timedelta(days=3650)
"""How long gloo waits for a message. How long a silent peer is waited for is decided above, by whoever waits: a peer
that computes for an hour is not lost. One that is gone is known by its connection."""


def lost(peer: int, error: BaseException) -> PeerLostError:
    return PeerLostError(f"gloo lost rank {peer}: {error}")


class TorchRequest:
    __slots__ = ("_done", "_error", "_under_way", "peer")

    def __init__(self, peer: int):
        self.peer = peer
        self._done = False
        self._error: BaseException | None = None
        self._under_way = threading.Lock()
        self._under_way.acquire()

    def finish(self, error: BaseException | None) -> None:
        self._error, self._done = error, True
        self._under_way.release()

    def block(self, timeout_s: float) -> None:
        """Wait until it is done, or for ``timeout_s``, without the GIL: who looks again and again keeps the GIL from
        the thread that would finish the request, for 5 ms a message."""
        if self._under_way.acquire(timeout=timeout_s):
            self._under_way.release()

    def test(self) -> bool:
        if self._error is not None:
            raise lost(self.peer, self._error) from self._error
        return self._done

    def peers(self) -> Sequence[int]:
        return (self.peer,)


class TorchExchange(Exchange):
    def block(self, timeout_s: float) -> None:
        """Wait for the oldest message each way."""
        for _, request in (*self._receives[:1], *self._sends[:1]):
            cast(TorchRequest, request).block(timeout_s)


class _Waiter:
    """A thread that waits for requests in the order of posting. gloo's point-to-point works can be waited for but not
    asked whether they are done, and a wait that times out closes the connection."""

    def __init__(self, name: str):
        self._posted: queue.SimpleQueue[tuple[Any, TorchRequest] | None] = queue.SimpleQueue()
        self._waits = threading.Event()
        arguments = self._posted, self._waits
        self._thread = threading.Thread(target=_wait_for, args=arguments, name=name, daemon=True)
        self._thread.start()
        weakref.finalize(self, self._posted.put, None).atexit = False

    def post(self, work: Any, request: TorchRequest) -> TorchRequest:
        self._posted.put((work, request))
        return request

    @property
    def busy(self) -> bool:
        """Whether the thread is in gloo."""
        return self._waits.is_set()

    def close(self) -> None:
        self._posted.put(None)
        self._thread.join(timeout=1)


def _wait_for(posted: queue.SimpleQueue[tuple[Any, TorchRequest] | None], waits: threading.Event) -> None:
    """A waiter's thread; ends when nobody has the waiter any more. ``waits``: set while the thread is in gloo."""
    while (next_one := posted.get()) is not None:
        work, request = next_one
        waits.set()
        try:
            work.wait(PATIENCE)
            request.finish(None)
        except Exception as error:
            request.finish(error)
        waits.clear()


class _Connections:
    """What all transports of this process that are split from one another share."""

    def __init__(self, gloo: Any):
        self.gloo = gloo
        self.contexts = Contexts(2**30)
        self.against = ""
        """Why no more messages can be sent; empty as long as they can."""
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self.against = "this process was forked from a rank, and is none itself"


class TorchTransport:
    """Ranks of a gloo process group of its own, made from ``store``; torch's default process group is not touched."""

    name = "torch"
    moves_itself = False
    threads = True
    piggyback_bytes = 0

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        timeout_s: float,
        prefix: str = "commlab",
    ):
        """Collective: connects all ranks, each of which is waited for ``timeout_s``."""
        gloo = dist.ProcessGroupGloo(dist.PrefixStore(prefix, store), rank, size, timedelta(seconds=timeout_s))
        # The store's server lives in a rank's process.
        self._store: dist.Store | None = store
        self._begin(_Connections(gloo), range(size), rank, 0, any_order=False)

    def _begin(
        self, connections: _Connections, ranks: Sequence[int], rank: int, context: int, *, any_order: bool
    ) -> None:
        self._connections, self._ranks, self._context = connections, ranks, context
        self.rank, self.size = rank, len(ranks)
        self.contexts = connections.contexts
        # A thread that waits for one peer sees nothing of another: where they may answer in any order each has its own.
        self._any_order = any_order
        self._waiters: dict[tuple[str, int], _Waiter] = {}

    def isend(self, data: Bytes, to: int) -> TorchRequest:
        return self._post("send", data, to)

    def irecv(self, data: Bytes, frm: int) -> TorchRequest:
        return self._post("recv", data, frm)

    def _post(self, kind: str, data: Bytes, peer: int) -> TorchRequest:
        if self._connections.against:
            raise UsageError(self._connections.against)
        try:
            work = getattr(self._connections.gloo, kind)([torch.from_numpy(data)], self._ranks[peer], self._context)
        except RuntimeError as error:  # the connection was closed before
            raise lost(peer, error) from error
        key = kind, peer if self._any_order else -1
        if key not in self._waiters:
            self._waiters[key] = _Waiter(f"commlab {kind}")
        return self._waiters[key].post(work, TorchRequest(peer))

    def exchange(self, record: bytes, piggyback: Piggyback | None = None) -> Exchange:
        assert piggyback is None
        return TorchExchange(self, record)

    def split(self, ranks: Sequence[int], context: int, *, any_order: bool = False) -> TorchTransport | None:
        self.contexts.take(context, self.rank)
        if self.rank not in ranks:
            return None
        made = TorchTransport.__new__(TorchTransport)
        mine = [self._ranks[rank] for rank in ranks]
        made._begin(self._connections, mine, list(ranks).index(self.rank), context, any_order=any_order)
        return made

    def beside(self) -> TorchTransport:
        made = TorchTransport.__new__(TorchTransport)
        made._begin(self._connections, self._ranks, self.rank, self.contexts.beside(self._context), any_order=True)
        return made

    def abort(self, code: int) -> None:
        # torchrun and mpirun both end the other ranks when one leaves with an exit code other than 0; the interpreter's
        # own exit would wait for gloo's threads.
        os._exit(code)

    def let_go(self) -> None:
        """The interpreter ends: a thread that still waits in gloo for a peer that does not come would end it with
        SIGABRT."""
        abort = getattr(self._connections.gloo, "abort", None)
        if abort is not None and any(waiter.busy for waiter in self._waiters.values()):
            abort()
            for waiter in self._waiters.values():
                waiter.close()

    def close(self, orderly: bool = True) -> None:
        for waiter in self._waiters.values():
            waiter.close()
        if self._context == 0 and not self._connections.against:
            self._connections.against = "the group of all ranks was shut down"
            self._connections.gloo = self._store = None
