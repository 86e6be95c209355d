"""A worker's side of the messages: every request is answered once, and a handle waits for the answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ... import trace
from ...errors import UsageError
from ...runtime.handle import Handle
from ...runtime.waiting import begin_moving, gone_words, pause, silence_of, spin_s, stop_moving, wait_until
from ...transport.base import Transport
from ..encoding import decode
from ..link import Link, Order
from ..messages import Header, Kind


class Message(NamedTuple):
    """A request to one server. ``data``: bytes to send, unchanged until the request is answered; ``target``: where to
    write the values that come back (bytes)."""

    server: int
    order: Order
    header: Header
    data: torch.Tensor | None = None
    target: torch.Tensor | None = None


class PendingRequests:
    """A push, a pull or the end of a clock under way: some requests, and the handle that the caller holds. ``what``
    names the call in messages. ``complete(call)`` runs when all answers are there and none is an error, before anybody
    sees the handle finished. ``follows``: the handle of an earlier call, which ends no later than this one; where the
    earlier call fails, so does this one."""

    def __init__(
        self,
        client: Client,
        what: str,
        result: Any = None,
        complete: Callable[[PendingRequests], None] | None = None,
        follows: Handle | None = None,
    ):
        self.what, self.follows, self._complete = what, follows, complete
        self.handle = Handle(client, lambda: what, result)
        self.answers: list[Header] = []
        self.open = 0
        """How many requests are not answered."""
        self._error: UsageError | None = None

    def take(self, answer: Header, error: UsageError | None) -> None:
        """Take in one answer."""
        self.answers.append(answer)
        self._error = self._error or error
        self.open -= 1
        if self.open or self.handle.finished:
            return
        if self._error is None and self._complete is not None:
            self._complete(self)
        self.handle.finish(self._error)

    def fail_with(self, earlier: Handle) -> None:
        """End this call too where the call that it follows has failed."""
        if earlier.error is not None and not self.handle.finished:
            self.handle.finish(earlier.error)


class Client:
    """This worker's links to the servers at ``ranks`` of ``transport``. ``poll_local``: moves a server in this same
    process on, and returns whether anything moved. ``departed(rank)``: how a server has left, empty while it is there.
    """

    def __init__(
        self,
        transport: Transport,
        ranks: Sequence[int],
        timeout_s: float,
        crowded: bool,
        poll_local: Callable[[], bool] | None = None,
        departed: Callable[[int], str] = lambda rank: "",
    ):
        self._departed = departed
        self.rank, self._timeout_s, self._crowded, self._poll_local = transport.rank, timeout_s, crowded, poll_local
        self.links = [
            Link(transport, rank, partial(self._memory_for, server), partial(self._arrived, server))
            for server, rank in enumerate(ranks)
        ]
        self._open: list[dict[int, tuple[PendingRequests, torch.Tensor | None]]] = [{} for _ in ranks]
        """By server and sequence number: the requests that are not answered, with the target of their values."""
        self._sequence = 0
        self._moves = 0
        self._lock = threading.RLock()
        """Held while messages move, and while those of one call are queued: so none of a call's answers is taken in
        before all its requests are queued."""

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to all servers so far."""
        return sum(link.bytes_sent for link in self.links)

    # Requests and answers.

    def submit(self, call: PendingRequests, messages: Sequence[Message]) -> Handle:
        """Queue all requests of ``call``, at once. Returns the handle of ``call``."""
        with self._lock:
            if messages:
                if trace.enabled():
                    call.handle.begin()
                for message in messages:
                    self._queue(call, message)
            else:
                call.handle.finish()  # of tensors without numbers no server has anything
            if call.follows is not None:
                call.follows.when_finished(call.fail_with)
        return call.handle

    def _queue(self, call: PendingRequests, message: Message) -> None:
        server, order, header, data, target = message
        self._sequence += 1
        call.open += 1
        self._open[server][self._sequence] = call, target
        begin_moving(self)
        length = 0 if data is None else data.numel()
        self.links[server].send(order, header._replace(sequence=self._sequence, length=length), data)
        if not self.links[server].listening:
            self.links[server].listen()

    def _memory_for(self, server: int, header: Header) -> torch.Tensor:
        _, target = self._open[server][header.sequence]
        if header.kind == Kind.VALUES and target is not None and target.numel() == header.length:
            return target
        return torch.empty(header.length, dtype=torch.uint8, device="cpu")

    def _arrived(self, server: int, header: Header, data: torch.Tensor) -> None:
        call, _ = self._open[server].pop(header.sequence)
        error = None
        if header.kind == Kind.ERROR:
            reason = bytes(data.numpy()).decode(errors="replace")
            error = UsageError(f"rank {self.rank}: {call.what} was refused by server {server}: {reason}")
        elif header.kind == Kind.TEXT:
            call.handle.result = bytes(data.numpy()).decode()
        elif header.kind == Kind.STATE:
            try:
                call.handle.result = decode(data)
            except UsageError as broken:
                error = UsageError(f"rank {self.rank}: {call.what} by server {server}: {broken}")
        if self._open[server]:
            self.links[server].listen()
        elif not any(self._open):
            stop_moving(self)
        call.take(header, error)

    # The driver of its handles (:class:`commlab.runtime.handle.Driver`).

    def poll(self) -> None:
        """Go on without waiting."""
        if self._lock.acquire(blocking=False):
            try:
                moved = self._poll_local is not None and self._poll_local()
                for link in self.links:
                    moved = link.poll() or moved
                self._moves += moved
            finally:
                self._lock.release()

    def drive(self, handle: Handle, timeout_s: float | None = None) -> None:
        """Wait for ``handle``. PeerTimeoutError when nothing has moved for ``timeout_s``; a warning that names the
        silent servers after 10 s."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        wait_until(lambda: handle.finished, _Awaited(self, handle), limit_s)

    def advance(self) -> int:
        """Go on without waiting; returns how often anything has moved so far, in any thread."""
        self.poll()
        return self._moves

    def rest(self, idle_s: float) -> None:
        """Wait a little for messages, and not at all right after something moved."""
        if idle_s:
            pause(idle_s, spin_s(self._crowded, any(link.moving for link in self.links)))

    def _silent(self, handle: Handle) -> dict[int, PendingRequests]:
        """The call of ``handle``, by the ranks of the servers that have not answered it."""
        silent: dict[int, PendingRequests] = {}
        for link, requests in zip(self.links, self._open, strict=True):
            for call, _ in list(requests.values()):
                if call.handle is handle:
                    silent[link.peer] = call
        return silent

    def gone(self, handle: Handle) -> str:
        """The sentence that says which of the awaited servers have left; empty while all are there."""
        return gone_words(self.rank, list(self._silent(handle)), self._departed, handle.describe)

    def silence(self, handle: Handle, idle_s: float) -> str:
        """The sentence that names the servers that have not answered; empty once all have."""
        silent = self._silent(handle)
        for call in silent.values():
            if call.follows is not None and not call.follows.finished:
                return self.silence(call.follows, idle_s)
        return silence_of(self.rank, list(silent), "server rank", idle_s, handle.describe()) if silent else ""


class _Awaited:
    """A handle that is waited for (:class:`commlab.runtime.waiting.Waiter`)."""

    def __init__(self, client: Client, handle: Handle):
        self._client = self.driver = client
        self._handle = handle

    def advance(self) -> object:
        return self._client.advance()

    def rest(self, idle_s: float) -> None:
        self._client.rest(idle_s)

    def gone(self) -> str:
        return self._client.gone(self._handle)

    def silence(self, idle_s: float) -> str:
        return self._client.silence(self._handle, idle_s)
