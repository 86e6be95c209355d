"""A call of a worker under way: the requests that it has made, what answers them, and the handle of its caller."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch

from ...errors import CommlabError, PeerTimeoutError, UsageError
from ...runtime.handle import Driver, Handle
from .. import frames
from ..encoding import decode
from ..messages import Header, Kind

NEVER = 2**62
"""A clock, and a version, that is never reached."""


class Caller(Driver, Protocol):
    """What a call knows of the client that makes it. ``rank`` is for messages."""

    rank: int

    def note_refused(self, call: PendingRequests) -> None:
        """``call`` was refused: somebody has to be told."""


class PendingRequests(Handle):
    """A push, a pull or the end of a clock under way: some requests, and the handle that the caller holds. ``what``
    names the call in messages, where there are ``keys`` followed by these and ``clock``. ``complete(call)`` runs when
    all answers are there and none is an error, before anybody sees the handle finished. ``follows``: the handle of an
    earlier call, which ends no later than this one; where the earlier call fails, so does this one. ``needs_clocks``:
    how many clocks this worker must have ended before the servers can answer."""

    __slots__ = (
        "_client",
        "_complete",
        "_refusal",
        "answer",
        "asked",
        "clock",
        "follows",
        "keys",
        "needs_clocks",
        "open",
        "version",
        "what",
    )

    def __init__(
        self,
        client: Caller,
        what: str,
        keys: tuple[str, ...] = (),
        clock: int = 0,
        result: Any = None,
        complete: Callable[[PendingRequests], None] | None = None,
        follows: Handle | None = None,
        needs_clocks: int = 0,
    ):
        Handle.__init__(self, client, None, result)
        self._client, self.asked = client, False
        self.what, self.keys, self.clock = what, keys, clock
        self.follows, self._complete, self.needs_clocks = follows, complete, needs_clocks
        self.answer: Header | None = None
        """The last answer to a request that travelled alone."""
        self.version = NEVER
        """The least version of the values that were answered."""
        self.open = 0
        """How many requests are not answered."""
        self._refusal: CommlabError | None = None

    def describe(self) -> str:
        if not self.keys:
            return self.what
        named = repr(self.keys[0]) if len(self.keys) == 1 else f"{self.keys[0]!r} .. {self.keys[-1]!r}"
        return f"{self.what} of {named}" + (f" at clock {self.clock}" if self.clock >= 0 else "")

    def wait(self, timeout_s: float | None = None) -> Any:
        self.asked = True
        return Handle.wait(self, timeout_s)

    def take(self, version: int, refusal: CommlabError | None) -> None:
        """Take in one answer."""
        if version < self.version:
            self.version = version
        if refusal is not None and self._refusal is None:
            self._refusal = refusal
        self.open -= 1
        if self.open or self.finished:
            return
        complete, self._complete = self._complete, None
        if self._refusal is not None:
            self._client.note_refused(self)
        elif complete is not None:
            complete(self)
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


class LoneRequest:
    """A request that travels alone, and is not answered yet."""

    def __init__(self, client: Caller, kind: Kind, call: PendingRequests, target: torch.Tensor | None):
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
            error = refusal(client.rank, call, server, header, data)
        elif header.kind == Kind.TEXT:
            call.result = bytes(data.numpy()).decode()
        elif header.kind == Kind.STATE:
            try:
                call.result = decode(data)
            except UsageError as broken:
                error = UsageError(f"rank {client.rank}: {call.describe()} by server {server}: {broken}")
        call.answer = header
        call.take(header.clock if header.kind == Kind.VALUES else NEVER, error)
        return True


class FrameRequest:
    """The entries of a frame that are not answered yet, by their first slice. ``dtype``: of the numbers."""

    def __init__(self, client: Caller, kind: Kind, items: dict[int, Item], dtype: torch.dtype | None):
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
                call.take(NEVER, refusal(self._client.rank, call, server, header, body))
        else:
            self._items = {}
            for item in items.values():
                call = item.call
                call.take(NEVER, refusal(self._client.rank, call, server, header, data) if data.numel() else None)
        return not self._items

    def _write(self, targets: list[torch.Tensor], body: torch.Tensor, dtype: torch.dtype | None) -> None:
        assert dtype is not None
        numbers = body.view(dtype).to(self._dtype).split([target.numel() for target in targets])
        with torch.inference_mode():  # in which every tensor may be written, those made in it too
            torch._foreach_copy_(targets, numbers)


def refusal(rank: int, call: PendingRequests, server: int, header: Header, data: torch.Tensor) -> CommlabError:
    """The error of ``call``, which a server has refused for the reason in ``data``."""
    reason = bytes(data.numpy()).decode(errors="replace")
    if header.flag:
        return UsageError(f"rank {rank}: {call.describe()} was refused by server {server}: {reason}")
    return PeerTimeoutError(f"rank {rank}: {call.describe()} at server {server}: {reason}")
