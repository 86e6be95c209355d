"""A worker's side of the messages: every request is answered once, and a handle waits for the answers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ... import trace
from ...errors import PeerTimeoutError, UsageError
from ...runtime.waiting import WARN_AFTER_S, pause, spin_s
from ...transport.base import Transport
from ..encoding import decode
from ..link import Link, Order
from ..messages import Header, Kind
from ..server.loop import Serving

log = logging.getLogger("commlab")


class Handle:
    """A push, a pull or the end of a clock under way, made of one request or several. ``result``: what :meth:`wait`
    returns, once all of them are answered."""

    def __init__(self, client: Client, what: str, result: Any = None):
        self._client, self._what, self.result = client, what, result
        self.error: BaseException | None = None
        self.answers: list[Header] = []
        self.open = 0
        """Requests that are not answered."""
        self.after: Callable[[Handle], None] | None = None
        """Called once with the last answer."""
        self.before: Handle | None = None
        """Ends no later, and belongs to it: its error is this one's."""
        self._started_ns = time.perf_counter_ns() if trace.enabled() else 0

    @property
    def finished(self) -> bool:
        return self.open == 0

    def describe(self) -> str:
        """The operation, as it is named in messages."""
        return self._what

    def answered(self, answer: Header, error: BaseException | None = None) -> None:
        """Take in one answer. Called by :class:`Client` only."""
        self.answers.append(answer)
        self.error = self.error or error
        if self.open == 1 and self.after is not None and self.error is None:
            self.after(self)
        if self.open == 1 and self._started_ns:
            trace.record(self._what, "exchange", self._started_ns, time.perf_counter_ns())
        self.open -= 1

    def done(self) -> bool:
        """Whether it has ended; never blocks, and helps it on. An error is kept for :meth:`wait`."""
        if not self.finished:
            self._client.poll()
        return self.finished

    test = done

    def peers(self) -> Sequence[int]:
        """The servers that have not answered."""
        return self._client.silent(self)

    def wait(self, timeout_s: float | None = None) -> Any:
        """Block until it has ended. Raises what the server had against it; PeerTimeoutError when no server has said
        anything for ``timeout_s`` (default: the group's timeout)."""
        if self.before is not None:
            self.before.wait(timeout_s)
        if not self.finished:
            self._client.drive(self, timeout_s)
        if self.error is not None:
            raise self.error
        return self.result


class _Request(NamedTuple):
    handle: Handle
    target: torch.Tensor | None
    """Where the values go, as bytes."""


class Client:
    """This worker's links to the servers at ``ranks`` of ``transport``. ``served``: a server in this same process,
    moved on whenever the worker waits."""

    def __init__(
        self,
        transport: Transport,
        ranks: Sequence[int],
        timeout_s: float,
        crowded: bool,
        served: Serving | None = None,
    ):
        self.rank, self._timeout_s, self._crowded, self._served = transport.rank, timeout_s, crowded, served
        self._links = [
            Link(transport, rank, partial(self._place, server), partial(self._arrived, server))
            for server, rank in enumerate(ranks)
        ]
        self._open: list[dict[int, _Request]] = [{} for _ in ranks]
        self._sequence = 0
        self._heard_s = time.perf_counter()
        self.lock = threading.RLock()
        """Held while the requests of one handle are queued: none of its answers is taken in before all are."""

    @property
    def bytes_sent(self) -> int:
        return sum(link.bytes_sent for link in self._links)

    @property
    def messages_sent(self) -> int:
        return sum(link.messages_sent for link in self._links)

    def request(
        self,
        server: int,
        order: Order,
        header: Header,
        handle: Handle,
        data: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
    ) -> None:
        """Queue a request. ``data``: bytes to send, unchanged until it is answered; ``target``: where to write the
        values (bytes)."""
        with self.lock:
            self._sequence += 1
            handle.open += 1
            self._open[server][self._sequence] = _Request(handle, target)
            length = 0 if data is None else data.numel()
            self._links[server].send(order, header._replace(sequence=self._sequence, length=length), data)
            if not self._links[server].listening:
                self._links[server].listen()

    def _place(self, server: int, header: Header) -> torch.Tensor:
        target = self._open[server][header.sequence].target
        if header.kind == Kind.VALUES and target is not None and target.numel() == header.length:
            return target
        return torch.empty(header.length, dtype=torch.uint8)

    def _arrived(self, server: int, header: Header, data: torch.Tensor) -> None:
        handle, _ = self._open[server].pop(header.sequence)
        error = None
        if header.kind == Kind.ERROR:
            text = bytes(data.numpy()).decode(errors="replace")
            error = UsageError(f"rank {self.rank}: {handle.describe()} was refused by server {server}: {text}")
        elif header.kind == Kind.TEXT:
            handle.result = bytes(data.numpy()).decode()
        elif header.kind == Kind.STATE:
            try:
                handle.result = decode(data)
            except UsageError as broken:
                error = UsageError(f"rank {self.rank}: {handle.describe()} by server {server}: {broken}")
        self._heard_s = time.perf_counter()
        if self._open[server]:
            self._links[server].listen()
        handle.answered(header, error)

    def silent(self, handle: Handle) -> list[int]:
        """Ranks of the servers that have not answered ``handle``."""
        return [
            self._links[server].peer
            for server, requests in enumerate(self._open)
            if any(request.handle is handle for request in list(requests.values()))
        ]

    def poll(self) -> bool:
        """Go on without waiting; returns whether anything moved."""
        if not self.lock.acquire(blocking=False):
            return False
        try:
            moved = self._served.poll() if self._served is not None else False
            for link in self._links:
                moved = link.poll() or moved
            return moved
        finally:
            self.lock.release()

    def drive(self, handle: Handle, timeout_s: float | None = None) -> None:
        """Wait for ``handle``. PeerTimeoutError when no answer at all has come for ``timeout_s``; a warning that names
        the silent servers after 10 s."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        since_s = idle_since_s = warned_s = time.perf_counter()
        while not handle.finished:
            now_s = time.perf_counter()
            if self.poll():
                idle_since_s = now_s
                continue
            silent_s = now_s - max(since_s, self._heard_s)
            if silent_s > limit_s:
                advice = "it may be stuck or slow: see its own output, or raise the timeout"
                raise PeerTimeoutError(f"{self._silence(handle, silent_s)}; {advice}")
            if silent_s > WARN_AFTER_S and now_s - warned_s > WARN_AFTER_S:
                warned_s = now_s
                log.warning("%s", self._silence(handle, silent_s))
            moving = any(link.moving for link in self._links)
            pause(now_s - idle_since_s, spin_s(self._crowded, moving))

    def _silence(self, handle: Handle, silent_s: float) -> str:
        peers = handle.peers()
        return (
            f"rank {self.rank} has waited {silent_s:.1f} s for server rank{'s' * (len(peers) > 1)} "
            f"{', '.join(map(str, peers))} in {handle.describe()}"
        )
