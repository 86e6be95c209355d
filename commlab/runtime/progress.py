"""Who moves an operation on. Operations of a group run strictly one after the other, in the order in which they were
started, which is the same on every rank: so no message needs a name, and no two ranks can wait for each other in a
circle.

Where a core is free (cores > local ranks) one thread per group does it, asleep when there is nothing to do. Elsewhere a
thread would only take the core from the computation, and progress happens in ``poll`` (called from the gradient hooks)
and in ``wait``.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from .. import trace
from ..errors import PeerLostError
from ..transport.base import Pending
from .handle import Handle
from .waiting import GONE_AFTER_S, SPIN_S, gone_words, pause, silence_of, wait_until


class Operation:
    """A computation under way, and the handle that its caller holds. ``rank`` is for messages; ``departed(rank)``: how
    a peer has left, empty while it is there."""

    __slots__ = ("_begun", "_departed", "_pending", "_rank", "handle", "waits_for")

    def __init__(self, pending: Pending, handle: Handle, rank: int, departed: Callable[[int], str] = lambda rank: ""):
        self._pending, self.handle, self._rank, self._departed = pending, handle, rank, departed
        self.waits_for: Any = None
        """The request that the computation waits for."""
        self._begun = False

    def advance(self) -> bool:
        """Go on as far as possible without waiting; returns whether the operation has ended."""
        if not self._begun:
            self._begun = True
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
        gone = self.gone(wait_s=GONE_AFTER_S)
        who, _, what = gone.partition(f" while rank {self._rank} is in ")
        if not gone:
            named = PeerLostError(f"rank {self._rank}: {error}, in {self.handle.describe()}")
        elif " left " in who:
            named = PeerLostError(f"{gone}: {error}")
        else:
            named = PeerLostError(f"rank {self._rank}: {who}, in {what}: {error}")
        named.__cause__ = error
        return named

    def gone(self, wait_s: float = 0.0) -> str:
        """The sentence that says which of the awaited ranks have left, and how; empty while all are there.
        ``wait_s``: how long the news may take, where it is known that there are some."""
        return gone_words(self._rank, self.peers(), self._departed, self.handle.describe, wait_s)

    def peers(self) -> tuple[int, ...]:
        """The ranks that the operation waits for."""
        return tuple(self.waits_for.peers()) if self.waits_for is not None else ()


class Progress:
    """The queue of one group. ``rank`` is for messages: the group's own, like the peers that they name."""

    def __init__(self, rank: int, timeout_s: float, threaded: bool):
        self.rank, self.timeout_s = rank, timeout_s
        self._queue: deque[Operation] = deque()
        self._lock = threading.Lock()
        self._waiting = False
        self._work = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._serve, name="commlab progress", daemon=True)
            self._thread.start()

    @property
    def threaded(self) -> bool:
        return self._thread is not None

    def submit(self, operation: Operation, awaited: bool = False) -> Handle:
        """Append an operation and start it if nothing is before it. ``awaited``: the caller goes on to wait for it;
        it is moved on here for a while, and the thread, which would only want the GIL for nothing, sleeps on."""
        if awaited and self.take():
            try:
                ended = operation.advance()
                stop_s = time.perf_counter() + SPIN_S
                while not (ended or hasattr(operation.waits_for, "block") or time.perf_counter() > stop_s):
                    os.sched_yield()
                    ended = operation.advance()
                if ended:
                    return operation.handle
                self._queue.append(operation)
            finally:
                self.leave()
            return operation.handle
        self._queue.append(operation)
        self.poll()
        if not awaited:
            self._work.set()
        return operation.handle

    def take(self) -> bool:
        """Whether nothing is under way; then nothing starts before :meth:`leave`."""
        if self._queue or not self._lock.acquire(blocking=False):
            return False
        if self._queue:
            self._lock.release()
            return False
        return True

    def leave(self) -> None:
        """End what :meth:`take` began."""
        self._lock.release()

    def poll(self) -> None:
        """Move on without waiting."""
        if self._lock.acquire(blocking=False):
            try:
                self._advance()
            finally:
                self._lock.release()

    def _advance(self) -> Operation | None:
        """Advance the queue's head, and the next ones while they end; returns the one that has to wait."""
        while self._queue:
            head = self._queue[0]
            if not head.advance():
                return head
            self._queue.popleft()
        self._work.clear()
        # What was submitted between the last look at the queue and now has set the flag in vain.
        if self._queue:
            self._work.set()
        return None

    def drive(self, handle: Handle, timeout_s: float | None = None) -> None:
        """Wait for ``handle`` (and all before it), moving the queue on. PeerTimeoutError when nothing has moved for
        ``timeout_s``; a warning that names the silent peer after 10 s."""
        self._waiting = True
        try:
            limit_s = self.timeout_s if timeout_s is None else timeout_s
            wait_until(lambda: handle.finished, _Caller(self, handle), limit_s)
        finally:
            self._waiting = False

    def _serve(self) -> None:
        while not self._closed:
            self._work.wait()
            idle_since_s = time.perf_counter()
            while self._work.is_set() and not self._closed:
                if self._waiting:
                    time.sleep(1e-3)
                    continue
                before = self._blocked_on()
                self.poll()
                now_s = time.perf_counter()
                if not self._queue or self._blocked_on() is not before:
                    idle_since_s = now_s
                else:
                    pause(now_s - idle_since_s, spin_s=0)

    def _blocked_on(self) -> object:
        try:
            return self._queue[0].waits_for
        except IndexError:  # the other thread may end the last operation at any moment
            return None

    def close(self) -> None:
        """Stop the thread. Operations still in the queue are dropped."""
        self._closed = True
        self._work.set()
        if self._thread is not None:
            self._thread.join(timeout=5)


class _Caller:
    """A caller that moves the queue on while it waits for ``handle``."""

    def __init__(self, progress: Progress, handle: Handle):
        self._progress, self._handle = progress, handle
        self._head: Operation | None = None

    def advance(self) -> object:
        with self._progress._lock:
            self._head = None if self._handle.finished else self._progress._advance()
        # Operations may share a request that is started anew for each: the head belongs to the mark.
        return self._head, None if self._head is None else self._head.waits_for

    def rest(self, idle_s: float) -> None:
        head = self._head
        if head is None:
            return
        block = getattr(head.waits_for, "block", None)
        if block is None:
            pause(idle_s)
            return
        # The request knows how to wait by itself. Back every 0.1 s: for signals, and to see who is silent.
        with self._progress._lock:
            try:
                block(0.1)
            except PeerLostError as error:
                raise head.lost(error) from error

    def gone(self) -> str:
        return "" if self._head is None else self._head.gone()

    def silence(self, idle_s: float) -> str:
        head = self._head
        return (
            ""
            if head is None
            else silence_of(self._progress.rank, head.peers(), "rank", idle_s, head.handle.describe())
        )
