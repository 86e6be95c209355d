"""Who moves an operation on. Operations of a group run strictly one after the other, in the order in which they were
started, which is the same on every rank: so no message needs a name, and no two ranks can wait for each other in a
circle.

Where a core is free (cores > local ranks) one thread per group does it, asleep when there is nothing to do. Elsewhere a
thread would only take the core from the computation, and progress happens in ``poll`` (called from the gradient hooks)
and in ``wait``.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence

from ..errors import PeerLostError, PeerTimeoutError
from .handle import Handle
from .waiting import SPIN_S, WARN_AFTER_S, pause

log = logging.getLogger("commlab")


class Progress:
    """The queue of one group. ``rank`` is for messages: the group's own, like the peers that they name."""

    def __init__(self, rank: int, timeout_s: float, threaded: bool):
        self.rank, self.timeout_s = rank, timeout_s
        self._queue: deque[Handle] = deque()
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

    def submit(self, handle: Handle, awaited: bool = False) -> Handle:
        """Append an operation and start it if nothing is before it. ``awaited``: the caller goes on to wait for it;
        it is moved on here for a while, and the thread, which would only want the GIL for nothing, sleeps on."""
        if awaited and self.take():
            try:
                handle.advance()
                stop_s = time.perf_counter() + SPIN_S
                while not (handle.finished or hasattr(handle.waits_for, "block") or time.perf_counter() > stop_s):
                    os.sched_yield()
                    handle.advance()
                if handle.finished:
                    return handle
                self._queue.append(handle)
            finally:
                self.leave()
            return handle
        self._queue.append(handle)
        self.poll()
        if not awaited:
            self._work.set()
        return handle

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

    def _advance(self) -> Handle | None:
        """Advance the queue's head, and the next ones while they end; returns the one that has to wait."""
        while self._queue:
            head = self._queue[0]
            head.advance()
            if not head.finished:
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
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        blocked_on: tuple[object, object] = (None, None)
        since_s = warned_s = time.perf_counter()
        self._waiting = True
        try:
            while not handle.finished:
                with self._lock:
                    head = None if handle.finished else self._advance()
                if head is None:
                    continue
                now_s = time.perf_counter()
                # Operations may share a request that is started anew for each: the head belongs to the comparison.
                if head is not blocked_on[0] or head.waits_for is not blocked_on[1]:
                    blocked_on, since_s, warned_s = (head, head.waits_for), now_s, now_s
                idle_s = now_s - since_s
                if idle_s > limit_s:
                    raise PeerTimeoutError(
                        self._silence(head, idle_s)
                        + "; it may be stuck or slow: see its own output, or raise the timeout"
                    )
                if now_s - warned_s > WARN_AFTER_S:
                    warned_s = now_s
                    log.warning("%s", self._silence(head, idle_s))
                block = getattr(head.waits_for, "block", None)
                if block is None:
                    pause(idle_s)
                else:
                    # It knows how to wait by itself. Back every 0.1 s: for signals, and to see who is silent.
                    with self._lock:
                        try:
                            block(0.1)
                        except PeerLostError as error:
                            raise head.lost(error) from error
        finally:
            self._waiting = False

    def _silence(self, head: Handle, idle_s: float) -> str:
        peers: Sequence[int] = head.waits_for.peers() if head.waits_for is not None else ()
        return (
            f"rank {self.rank} has waited {idle_s:.1f} s for rank{'s' if len(peers) > 1 else ''} "
            f"{', '.join(map(str, peers))} in {head.describe()}"
        )

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
