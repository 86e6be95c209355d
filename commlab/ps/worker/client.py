"""A worker's side of the messages: every request is answered once, and a handle waits for the answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ... import trace
from ...errors import CommlabError, UsageError
from ...runtime.handle import Handle
from ...runtime.waiting import begin_moving, gone_words, pause, silence_of, spin_s, stop_moving, wait_until
from ...transport.base import Transport
from ..link import Link, Order
from ..messages import Header, Kind
from .calls import NEVER, FrameRequest, Item, LoneRequest, PendingRequests

CLOSE = "close"
"""The one call that can still be made when a server has failed."""
_NUMBERS = frozenset((Kind.PUSH, Kind.PULL, Kind.PUSH_FRAME, Kind.PULL_FRAME))


def _nothing() -> None:
    """Nothing waits to become a frame."""


class Message(NamedTuple):
    """A request to one server. ``data``: bytes to send, unchanged until the request is answered; ``target``: where to
    write the values that come back (bytes)."""

    server: int
    order: Order
    header: Header
    data: torch.Tensor | None = None
    target: torch.Tensor | None = None


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
        self._open: list[dict[int, LoneRequest | FrameRequest]] = [{} for _ in ranks]
        """By server and sequence number: the requests that are not answered."""
        self.busy = [0] * len(ranks)
        """By server: how many pushes and pulls are not answered."""
        self.send_frames: Callable[[], None] = _nothing
        """Sends what waits to become a frame; called before every look at the links, where anything waits."""
        self.filling = False
        """Whether anything waits to become a frame: who has :attr:`send_frames` says so."""
        self.clock = NEVER
        """How many clocks this worker has ended; no limit where nobody says so, and once the worker has left."""
        self._early: dict[Handle, PendingRequests] = {}
        """Calls that can't be answered before this worker has ended more clocks."""
        self.failure: CommlabError | None = None
        """Why no call can end well any more: a server has failed."""
        self.failed: set[int] = set()
        """The servers that have failed."""
        self._unasked: list[PendingRequests] = []
        """Calls that were refused, and that nobody has waited for."""
        self._sequence = 0
        self._moves = 0
        self._thread = 0
        """The thread that has made the last call."""
        self.lock = threading.RLock()
        """Held while messages move, and while those of one call are queued: so none of a call's answers is taken in
        before all its requests are queued."""

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to all servers so far."""
        return sum(link.bytes_sent for link in self.links)

    def at_clock(self, clock: int) -> None:
        """This worker has ended ``clock`` clocks."""
        self.clock = clock
        self._early = {handle: call for handle, call in self._early.items() if call.needs_clocks > clock}

    def note_refused(self, call: PendingRequests) -> None:
        """A call was refused: somebody has to be told."""
        self._unasked.append(call)

    def raise_unasked(self, clock: int) -> None:
        """Raise the error of a call of an earlier clock than ``clock`` that nobody has waited for: what it asked for
        has not happened."""
        calls = [call for call in self._unasked if not call.asked]
        self._unasked = [call for call in calls if call.clock >= clock]
        for call in calls:
            if call.clock < clock and call.error is not None:
                raise call.error

    # Requests and answers.

    def submit(self, call: PendingRequests, messages: Sequence[Message]) -> Handle:
        """Queue all requests of ``call``, at once. Returns the handle of ``call``."""
        with self.lock:
            if self.filling:
                self.send_frames()  # what was asked for before goes first
            self.begin(call, len(messages))
            for server, order, header, data, target in messages:
                self._queue(server, order, header, data, LoneRequest(self, header.kind, call, target))
        return call

    def begin(self, call: PendingRequests, requests: int) -> None:
        """``call`` is about to make so many requests. The lock is held."""
        if self.failure is not None and call.what != CLOSE:
            raise self.failure
        if requests:
            self._thread = threading.get_ident()
            begin_moving(self)
            call.open += requests
            if trace.enabled():
                call.begin()
            if call.needs_clocks > self.clock:
                self._early[call] = call
        else:
            call.finish()  # of tensors without numbers no server has anything
        if call.follows is not None:
            call.follows.when_finished(call.fail_with)

    def submit_frame(
        self,
        server: int,
        order: Order,
        header: Header,
        data: torch.Tensor,
        items: dict[int, Item],
        dtype: torch.dtype | None,
    ) -> None:
        """Queue a frame, whose calls have begun. ``items``: by first slice. ``dtype``: of the numbers."""
        with self.lock:
            self._queue(server, order, header, data, FrameRequest(self, header.kind, items, dtype))

    def _queue(
        self, server: int, order: Order, header: Header, data: torch.Tensor | None, request: LoneRequest | FrameRequest
    ) -> None:
        self._sequence += 1
        self._open[server][self._sequence] = request
        self.busy[server] += header.kind in _NUMBERS
        begin_moving(self)
        length = 0 if data is None else data.numel()
        self.links[server].send(order, header._replace(sequence=self._sequence, length=length), data)
        if not self.links[server].listening:
            self.links[server].listen()

    def _memory_for(self, server: int, header: Header) -> torch.Tensor:
        request = self._open[server].get(header.sequence)
        memory = None if request is None else request.memory_for(header)
        return torch.empty(header.length, dtype=torch.uint8, device="cpu") if memory is None else memory

    def _arrived(self, server: int, header: Header, data: torch.Tensor) -> None:
        if header.kind == Kind.ERROR and not header.sequence:
            self._fail(server, bytes(data.numpy()).decode(errors="replace"))
            return
        request = self._open[server][header.sequence]
        answered = request.take(server, header, data)
        if answered:
            del self._open[server][header.sequence]
            self.busy[server] -= request.kind in _NUMBERS
        if self._open[server]:
            self.links[server].listen()
        elif not any(self._open) and not self.filling:
            stop_moving(self)

    def _fail(self, server: int, reason: str) -> None:
        """A server has failed: no call can end well any more."""
        self.send_frames()  # so that none of the calls is forgotten
        self.failed.add(server)
        self.failure = CommlabError(
            f"rank {self.rank}: server {server} (server rank {self.links[server].peer}) has failed: {reason}; this "
            "store can't be used any more, see the output of that rank"
        )
        requests = [request for opened in self._open for request in opened.values()]
        for opened in self._open:
            opened.clear()
        stop_moving(self)
        for call in [call for request in requests for call in request.calls()]:
            call.fail(self.failure)

    # The driver of its handles (:class:`commlab.runtime.handle.Driver`).

    def poll(self, frames: bool = True) -> None:
        """Go on without waiting. ``frames``: what waits to become a frame leaves, full or not."""
        if self.lock.acquire(blocking=False):
            try:
                if frames and self.filling:
                    self.send_frames()
                moved = self._poll_local is not None and self._poll_local()
                for link in self.links:
                    moved = link.poll() or moved
                self._moves += moved
            finally:
                self.lock.release()

    def move_aside(self) -> None:
        """Go on while this process waits for something else. Frames are full only when their own thread does: another
        one would send what that thread is still filling."""
        self.poll(frames=threading.get_ident() == self._thread)

    def drive(self, handle: Handle, timeout_s: float | None = None) -> None:
        """Wait for ``handle``. PeerTimeoutError when nothing has moved for ``timeout_s``; a warning that names the
        silent servers after 10 s. UsageError where the handle can't end before this worker calls ``step()``."""
        self._require_clocks(handle)
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

    def _calls(self, handle: Handle) -> Iterator[tuple[int, PendingRequests]]:
        """The call of ``handle``, with each server that has not answered it."""
        for link, opened in zip(self.links, self._open, strict=True):
            for request in list(opened.values()):
                for call in request.calls():
                    if call is handle:
                        yield link.peer, call

    def _require_clocks(self, handle: Handle) -> None:
        call = self._early.get(handle)
        if call is None:
            return
        self.poll()
        if not handle.finished:
            raise UsageError(
                f"rank {self.rank}: {call.describe()} can't be answered before this worker has ended clock "
                f"{call.needs_clocks - 1}, and it waits at clock {self.clock}; call step() first, then wait"
            )

    def gone(self, handle: Handle) -> str:
        """The sentence that says which of the awaited servers have left; empty while all are there."""
        return gone_words(self.rank, list(dict(self._calls(handle))), self._departed, handle.describe)

    def silence(self, handle: Handle, idle_s: float) -> str:
        """The sentence that names the servers that have not answered; empty once all have."""
        silent = dict(self._calls(handle))
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
