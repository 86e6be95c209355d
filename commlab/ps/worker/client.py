"""A worker's side of the messages: every request is answered once, and a handle waits for the answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ... import trace
from ...errors import CommlabError, PeerTimeoutError, UsageError
from ...runtime.handle import Handle
from ...runtime.waiting import pause, silence_of, spin_s, wait_until
from ...transport.base import Transport
from .. import frames
from ..encoding import decode
from ..link import Link, Order
from ..messages import Header, Kind

_NEVER = 2**62
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


class PendingRequests(Handle):
    """A push, a pull or the end of a clock under way: some requests, and the handle that the caller holds. ``what``
    names the call in messages, where there are ``keys`` followed by these and ``clock``. ``complete(call)`` runs when
    all answers are there and none is an error, before anybody sees the handle finished. ``follows``: the handle of an
    earlier call, which ends no later than this one; where the earlier call fails, so does this one. ``needs_clocks``:
    how many clocks this worker must have ended before the servers can answer."""

    __slots__ = ("_complete", "_refusal", "answer", "clock", "follows", "keys", "needs_clocks", "open", "version", "what")

    def __init__(
        self,
        client: Client,
        what: str,
        keys: tuple[str, ...] = (),
        clock: int = 0,
        result: Any = None,
        complete: Callable[[PendingRequests], None] | None = None,
        follows: Handle | None = None,
        needs_clocks: int = 0,
    ):
        Handle.__init__(self, client, None, result)
        self.what, self.keys, self.clock = what, keys, clock
        self.follows, self._complete, self.needs_clocks = follows, complete, needs_clocks
        self.answer: Header | None = None
        """The last answer to a request that travelled alone."""
        self.version = _NEVER
        """The least version of the values that were answered."""
        self.open = 0
        """How many requests are not answered."""
        self._refusal: CommlabError | None = None

    def describe(self) -> str:
        if not self.keys:
            return self.what
        named = repr(self.keys[0]) if len(self.keys) == 1 else f"{self.keys[0]!r} .. {self.keys[-1]!r}"
        return f"{self.what} of {named}" + (f" at clock {self.clock}" if self.clock >= 0 else "")

    def take(self, version: int, refusal: CommlabError | None) -> None:
        """Take in one answer."""
        if version < self.version:
            self.version = version
        if refusal is not None and self._refusal is None:
            self._refusal = refusal
        self.open -= 1
        if self.open or self.finished:
            return
        if self._refusal is None and self._complete is not None:
            self._complete(self)
        self.finish(self._refusal)

    def fail(self, error: BaseException) -> None:
        """End the call with ``error``, whatever is still to come."""
        if not self.finished:
            self.finish(error)

    def fail_with(self, earlier: Handle) -> None:
        """End this call too where the call that it follows has failed."""
        if earlier.error is not None:
            self.fail(earlier.error)


class Item(NamedTuple):
    """What a frame carries for one call: an entry, and its numbers, 1-D: those to push, or where pulled ones go. A
    push without a gradient has none."""

    first: int
    slices: int
    call: PendingRequests
    numbers: torch.Tensor | None


class _Alone:
    """A request that travels alone, and is not answered yet."""

    def __init__(self, client: Client, kind: Kind, call: PendingRequests, target: torch.Tensor | None):
        self._client, self.kind, self.call, self._target = client, kind, call, target

    def calls(self) -> Iterable[PendingRequests]:
        return (self.call,)

    def memory_for(self, header: Header) -> torch.Tensor | None:
        if header.kind == Kind.VALUES and self._target is not None and self._target.numel() == header.length:
            return self._target
        return None

    def take(self, server: int, header: Header, data: torch.Tensor) -> bool:
        """Take in the answer; returns whether the request is answered with this."""
        call, client = self.call, self._client
        error: CommlabError | None = None
        if header.kind == Kind.ERROR:
            error = client.refusal(call, server, header, data)
        elif header.kind == Kind.TEXT:
            call.result = bytes(data.numpy()).decode()
        elif header.kind == Kind.STATE:
            try:
                call.result = decode(data)
            except UsageError as broken:
                error = UsageError(f"rank {client.rank}: {call.describe()} by server {server}: {broken}")
        call.answer = header
        call.take(header.clock if header.kind == Kind.VALUES else _NEVER, error)
        return True


class _Framed:
    """The entries of a frame that are not answered yet, by their first slice. ``dtype``: of the numbers."""

    def __init__(self, client: Client, kind: Kind, items: dict[int, Item], dtype: torch.dtype | None):
        self._client, self.kind, self._items, self._dtype = client, kind, items, dtype

    def calls(self) -> Iterable[PendingRequests]:
        return (item.call for item in self._items.values())

    def memory_for(self, header: Header) -> torch.Tensor | None:
        return None

    def take(self, server: int, header: Header, data: torch.Tensor) -> bool:
        """Take in an answer; returns whether the whole frame is answered with this."""
        items, frm = self._items, f"server {server}"
        if header.kind == Kind.VALUES_FRAME:
            entries, versions, body = frames.unpack(header, data, frm, versions=True)
            answered = [items.pop(first) for first, _ in entries]
            self._write([item.numbers for item in answered if item.numbers is not None], body, header.dtype)
            for item, version in zip(answered, versions, strict=True):
                item.call.take(version, None)
        elif header.kind == Kind.REFUSED_FRAME:
            entries, _, body = frames.unpack(header, data, frm)
            for call in [items.pop(first).call for first, _ in entries]:
                call.take(_NEVER, self._client.refusal(call, server, header, body))
        else:
            self._items = {}
            for item in items.values():
                call = item.call
                call.take(_NEVER, self._client.refusal(call, server, header, data) if data.numel() else None)
        return not self._items

    def _write(self, targets: list[torch.Tensor], body: torch.Tensor, dtype: torch.dtype | None) -> None:
        assert dtype is not None
        numbers = body.view(dtype).to(self._dtype).split([target.numel() for target in targets])
        with torch.inference_mode():  # in which every tensor may be written, those made in it too
            torch._foreach_copy_(targets, numbers)


class Client:
    """This worker's links to the servers at ``ranks`` of ``transport``. ``poll_local``: moves a server in this same
    process on, and returns whether anything moved."""

    def __init__(
        self,
        transport: Transport,
        ranks: Sequence[int],
        timeout_s: float,
        crowded: bool,
        poll_local: Callable[[], bool] | None = None,
    ):
        self.rank, self._timeout_s, self._crowded, self._poll_local = transport.rank, timeout_s, crowded, poll_local
        self.links = [
            Link(transport, rank, partial(self._memory_for, server), partial(self._arrived, server))
            for server, rank in enumerate(ranks)
        ]
        self._open: list[dict[int, _Alone | _Framed]] = [{} for _ in ranks]
        """By server and sequence number: the requests that are not answered."""
        self.busy = [0] * len(ranks)
        """By server: how many pushes and pulls are not answered."""
        self.send_frames: Callable[[], None] = _nothing
        """Sends what waits to become a frame; called before every look at the links."""
        self.clock = _NEVER
        """How many clocks this worker has ended; no limit where nobody says so, and once the worker has left."""
        self._early: dict[Handle, PendingRequests] = {}
        """Calls that can't be answered before this worker has ended more clocks."""
        self.failure: CommlabError | None = None
        """Why no server will answer any more."""
        self._sequence = 0
        self._moves = 0
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

    # Requests and answers.

    def submit(self, call: PendingRequests, messages: Sequence[Message]) -> Handle:
        """Queue all requests of ``call``, at once. Returns the handle of ``call``."""
        with self.lock:
            self.send_frames()  # what was asked for before goes first
            self.begin(call, len(messages))
            for server, order, header, data, target in messages:
                self._queue(server, order, header, data, _Alone(self, header.kind, call, target))
        return call

    def begin(self, call: PendingRequests, requests: int) -> None:
        """``call`` is about to make so many requests. The lock is held."""
        if self.failure is not None:
            raise self.failure
        if requests:
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
            self._queue(server, order, header, data, _Framed(self, header.kind, items, dtype))

    def _queue(
        self, server: int, order: Order, header: Header, data: torch.Tensor | None, request: _Alone | _Framed
    ) -> None:
        self._sequence += 1
        self._open[server][self._sequence] = request
        self.busy[server] += header.kind in _NUMBERS
        length = 0 if data is None else data.numel()
        self.links[server].send(order, header._replace(sequence=self._sequence, length=length), data)
        if not self.links[server].listening:
            self.links[server].listen()

    def _memory_for(self, server: int, header: Header) -> torch.Tensor:
        request = self._open[server].get(header.sequence)
        memory = None if request is None else request.memory_for(header)
        return torch.empty(header.length, dtype=torch.uint8) if memory is None else memory

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

    def refusal(self, call: PendingRequests, server: int, header: Header, data: torch.Tensor) -> CommlabError:
        """The error of ``call``, which a server has refused for the reason in ``data``."""
        reason = bytes(data.numpy()).decode(errors="replace")
        if header.flag:
            return UsageError(f"rank {self.rank}: {call.describe()} was refused by server {server}: {reason}")
        return PeerTimeoutError(f"rank {self.rank}: {call.describe()} at server {server}: {reason}")

    def _fail(self, server: int, reason: str) -> None:
        """A server has failed: no call can end well any more."""
        self.failure = CommlabError(
            f"rank {self.rank}: server {server} (server rank {self.links[server].peer}) has failed: {reason}; this "
            "store can't be used any more, see the output of that rank"
        )
        requests = [request for opened in self._open for request in opened.values()]
        for opened in self._open:
            opened.clear()
        for call in [call for request in requests for call in request.calls()]:
            call.fail(self.failure)

    # The driver of its handles (:class:`commlab.runtime.handle.Driver`).

    def poll(self) -> None:
        """Go on without waiting."""
        if self.lock.acquire(blocking=False):
            try:
                self.send_frames()
                moved = self._poll_local is not None and self._poll_local()
                for link in self.links:
                    moved = link.poll() or moved
                self._moves += moved
            finally:
                self.lock.release()

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
        self._client, self._handle = client, handle

    def advance(self) -> object:
        return self._client.advance()

    def rest(self, idle_s: float) -> None:
        self._client.rest(idle_s)

    def silence(self, idle_s: float) -> str:
        return self._client.silence(self._handle, idle_s)
