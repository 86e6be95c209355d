"""Asynchrony is a handle: an operation that was started, and the one way to wait for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from .. import trace
from ..errors import PeerLostError
from ..transport.base import Pending

if TYPE_CHECKING:
    from .agreement import Signature
    from .progress import Progress


class Handle:
    """An operation under way: the ``sequence``-th of its group, on what ``signature`` says."""

    __slots__ = (
        "_progress",
        "_sequence",
        "_signature",
        "_started_ns",
        "error",
        "finished",
        "pending",
        "result",
        "waits_for",
    )

    def __init__(self, pending: Pending, result: Any, signature: Signature, sequence: int, progress: Progress):
        self.pending, self.result, self._progress = pending, result, progress
        self._signature, self._sequence = signature, sequence
        self.finished = False
        self.error: BaseException | None = None
        self.waits_for: Any = None
        self._started_ns = 0

    def describe(self) -> str:
        """The operation in messages: its name, sequence number and tensor."""
        return self._signature.text(self._sequence)

    def lost(self, error: PeerLostError) -> PeerLostError:
        """The transport knows the peer; this knows what was to be done with it."""
        named = PeerLostError(f"rank {self._progress.rank}: {error}, in {self.describe()}")
        named.__cause__ = error
        return named

    def advance(self) -> None:
        """Go on as far as possible without waiting. Called by :class:`Progress` only."""
        if not self._started_ns and trace.enabled():
            self._started_ns = time.perf_counter_ns()
        try:
            self.waits_for = next(self.pending)
        except StopIteration:
            if self._started_ns:
                trace.record(self.describe(), "exchange", self._started_ns, time.perf_counter_ns())
            self.finished = True
        except BaseException as error:
            # In this order: a thread that sees `finished` looks for `error` next.
            self.error = self.lost(error) if isinstance(error, PeerLostError) else error
            self.finished = True
            # An interrupt is for the program, not for whoever waits; but it has ended this operation too.
            if not isinstance(error, Exception):
                raise

    def done(self) -> bool:
        """Whether it has ended; never blocks, and helps it on. An error is kept for :meth:`wait`."""
        if not self.finished:
            self._progress.poll()
        return self.finished

    def wait(self, timeout_s: float | None = None) -> Any:
        """Block until it has ended; returns the reduced tensor. Raises what went wrong; PeerTimeoutError when a peer
        has been silent for ``timeout_s`` (default: the group's timeout)."""
        if not self.finished:
            self._progress.drive(self, timeout_s)
        if self.error is not None:
            raise self.error
        return self.result
