"""Asynchrony is a handle: an operation that was started, and the one way to wait for it. Of a group's operation, the
computation too, which ends its handle."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .. import trace
from ..errors import PeerLostError
from ..transport.base import Pending
from .waiting import GONE_AFTER_S, WORDS_S, gone_words


class Driver(Protocol):
    """Who moves operations on: a group's queue (:mod:`.progress`), or a worker's links to its servers."""

    def poll(self) -> object:
        """Move on as far as possible without waiting."""

    def drive(self, handle: Handle, timeout_s: float | None) -> None:
        """Return once ``handle`` has finished. PeerTimeoutError when peers have been silent for ``timeout_s`` (None:
        the driver's own timeout)."""


class Handle:
    """An operation under way, moved on by ``driver``. ``describe()`` names the operation in messages; ``result`` is
    what :meth:`wait` returns. ``given_up``: a wait ended before the operation did, and the driver wants to
    know of the next one."""

    __slots__ = ("_callbacks", "_describe", "_driver", "_started_ns", "error", "finished", "given_up", "result")

    def __init__(self, driver: Driver, describe: Callable[[], str] | None, result: Any = None):
        self._driver, self._describe, self.result = driver, describe, result
        self.error: BaseException | None = None
        self.finished = self.given_up = False
        self._callbacks: list[Callable[[Handle], object]] | None = None  # most handles have none
        self._started_ns = 0

    def describe(self) -> str:
        """The operation's name in messages."""
        return "" if self._describe is None else self._describe()

    def begin(self) -> None:
        """The operation's first step is taken now: its span in the trace starts here. Called by the driver, where spans
        are recorded."""
        self._started_ns = time.perf_counter_ns()

    def finish(self, error: BaseException | None = None) -> None:
        """The operation has ended, with ``error`` or with :attr:`result` complete. Called once, by the driver."""
        if self._started_ns and error is None:
            trace.record(self.describe(), "exchange", self._started_ns, time.perf_counter_ns())
        # In this order: a thread that sees ``finished`` looks for ``error`` next.
        self.error = error
        self.finished = True
        if self._callbacks:
            self._call_back()

    def when_finished(self, call: Callable[[Handle], object]) -> None:
        """Run ``call(handle)`` once, when the operation has ended: at once if it has, else in the thread that ends
        it."""
        if self._callbacks is None:
            self._callbacks = []
        self._callbacks.append(call)
        if self.finished:
            self._call_back()

    def _call_back(self) -> None:
        # Both threads may come here; a list gives each of its items to one of them.
        while self._callbacks:
            try:
                call = self._callbacks.pop(0)
            except IndexError:
                return
            call(self)

    def done(self) -> bool:
        """Whether the operation has ended; never blocks, and helps it on. An error is kept for :meth:`wait`."""
        if not self.finished:
            self._driver.poll()
        return self.finished

    def wait(self, timeout_s: float | None = None) -> Any:
        """Block until the operation has ended; returns :attr:`result`, for a collective the reduced tensor. Raises what
        went wrong; PeerTimeoutError when a peer has been silent for ``timeout_s`` (default: the group's timeout)."""
        if not self.finished or self.given_up:
            self._driver.drive(self, timeout_s)
        if self.error is not None:
            raise self.error
        return self.result


class Operation:
    """A computation under way, and the handle that its caller holds. ``rank`` is for messages; ``departed(rank)``: how
    a peer has left, empty while it is there."""

    __slots__ = ("_departed", "_pending", "_rank", "begun", "handle", "waits_for")

    def __init__(self, pending: Pending, handle: Handle, rank: int, departed: Callable[[int], str] = lambda rank: ""):
        self._pending, self.handle, self._rank, self._departed = pending, handle, rank, departed
        self.waits_for: Any = None
        """The request that the computation waits for."""
        self.begun = False

    def advance(self) -> bool:
        """Go on as far as possible without waiting; returns whether the operation has ended."""
        if not self.begun:
            self.begun = True
            if trace.enabled():
                self.handle.begin()
        try:
            self.waits_for = next(self._pending)
            return False
        except StopIteration:
            if not self.handle.finished:  # an interrupt may have ended the operation before
                self.handle.finish()
        except Exception as error:
            self.handle.finish(self.lost(error) if isinstance(error, PeerLostError) else error)
        except BaseException as interrupt:
            # An interrupt is for the program, not for whoever waits; but it has ended this operation too.
            self.handle.finish(interrupt)
            raise
        return True

    def lost(self, error: PeerLostError) -> PeerLostError:
        """The transport knows the peer; the operation knows what was to be done with it, and perhaps how the peer has
        ended."""
        peers, wait_s = (self.peers(), GONE_AFTER_S) if error.rank is None else ((error.rank,), WORDS_S)
        gone = self._gone(peers, wait_s)
        who, _, what = gone.partition(f" while rank {self._rank} is in ")
        if not gone:
            named = PeerLostError(f"rank {self._rank}: {error}, in {self.handle.describe()}")
        elif " left " in who:
            named = PeerLostError(f"{gone}: {error}")
        else:
            named = PeerLostError(f"rank {self._rank}: {who}, in {what}: {error}")
        named.rank = error.rank
        named.__cause__ = error
        return named

    def gone(self) -> str:
        """The sentence that says which of the awaited ranks have left, and how; empty while all are there."""
        return self._gone(self.peers(), 0.0)

    def _gone(self, peers: Sequence[int], wait_s: float) -> str:
        return gone_words(self._rank, peers, self._departed, self.handle.describe, wait_s)

    def peers(self) -> tuple[int, ...]:
        """The ranks that the operation waits for."""
        return tuple(self.waits_for.peers()) if self.waits_for is not None else ()
