"""Transport over torch.distributed's gloo: works under mpirun and under torchrun, needs no MPI. Slower per message than
MPI."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from ..errors import PeerLostError
from .base import Bytes, Exchange, Piggyback


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
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, work: Any, request: TorchRequest) -> TorchRequest:
        self._posted.put((work, request))
        return request

    def _run(self) -> None:
        while (posted := self._posted.get()) is not None:
            work, request = posted
            try:
                work.wait()
                request.finish(None)
            except Exception as error:
                request.finish(error)

    def close(self) -> None:
        self._posted.put(None)
        self._thread.join(timeout=1)


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
        any_order: bool = False,
    ):
        self._store, self._prefix, self._timeout_s = store, prefix, timeout_s
        self.rank, self.size = rank, size
        # Our own timeout comes first and can name the peer; gloo's is the net below it.
        self._gloo: Any = dist.ProcessGroupGloo(
            dist.PrefixStore(prefix, store), rank, size, timedelta(seconds=2 * timeout_s + 60)
        )
        # A thread that waits for one peer sees nothing of another: where they may answer in any order each has its own.
        self._any_order = any_order
        self._waiters: dict[tuple[str, int], _Waiter] = {}
        self._splits = 0

    def isend(self, data: Bytes, to: int) -> TorchRequest:
        return self._post("sends", self._gloo.send, data, to)

    def irecv(self, data: Bytes, frm: int) -> TorchRequest:
        return self._post("receives", self._gloo.recv, data, frm)

    def _post(self, kind: str, call: Callable[..., Any], data: Bytes, peer: int) -> TorchRequest:
        try:
            work = call([torch.from_numpy(data)], peer, 0)
        except RuntimeError as error:  # the connection was closed before
            raise lost(peer, error) from error
        key = kind, peer if self._any_order else -1
        if key not in self._waiters:
            self._waiters[key] = _Waiter(f"commlab {kind}")
        return self._waiters[key].post(work, TorchRequest(peer))

    def exchange(self, record: bytes, piggyback: Piggyback | None = None) -> Exchange:
        assert piggyback is None
        return TorchExchange(self, record)

    def split(self, ranks: Sequence[int], *, any_order: bool = False) -> TorchTransport | None:
        self._splits += 1
        if self.rank not in ranks:
            return None
        prefix = f"{self._prefix}/{self._splits}:{','.join(map(str, ranks))}"
        return TorchTransport(self._store, list(ranks).index(self.rank), len(ranks), self._timeout_s, prefix, any_order)

    def abort(self, code: int) -> None:
        # torchrun and mpirun both end the other ranks when one leaves with an exit code other than 0; the interpreter's
        # own exit would wait for gloo's threads.
        import os

        os._exit(code)

    def close(self) -> None:
        for waiter in self._waiters.values():
            waiter.close()
        del self._gloo
