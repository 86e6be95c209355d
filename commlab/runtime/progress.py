"""Who moves an operation on. Operations of a group run strictly one after the other, in the order in which they were
started, which is the same on every rank: so no message needs a name, and no two ranks can wait for each other in a
circle.

Where a core is free (cores > local ranks) one thread per group does it, asleep when there is nothing to do. Elsewhere a
thread would only take the core from the computation, and progress happens in ``poll`` (called from the gradient hooks)
and in ``wait``: whoever waits, for whichever group or parameter server, moves all of them on
(:func:`.waiting.move_others`).

A queue ends with the first operation that breaks off, and with a wait that gives up: what the ranks have sent and not
read would be taken for the next operation's. From then on every call says what has ended it. What all ranks find out
together, before anything is sent, ends nothing: a disagreement, and arguments that a rank refuses.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from typing import Any

from ..errors import PeerLostError, UsageError
from .ending import HARMLESS, Ending, ended_by, kept
from .handle import Handle, Operation
from .waiting import (
    SPIN_S,
    begin_moving,
    others_move,
    pause,
    silence_of,
    stop_moving,
    under_way,
    wait_until,
)

_all: weakref.WeakSet[Progress] = weakref.WeakSet()


def _in_child() -> None:
    """A forked child has the memory of its parent's queues, and no part in them."""
    for progress in list(_all):
        progress._queue, progress._lock = deque(), threading.Lock()
        progress.ended = Ending(UsageError, "belongs to the process from which this one was forked")
    under_way.clear()


os.register_at_fork(after_in_child=_in_child)


class Progress:
    """The queue of one group. ``rank`` is for messages: the group's own, like the peers that they name."""

    def __init__(self, rank: int, timeout_s: float, threaded: bool):
        self.rank, self.timeout_s = rank, timeout_s
        self.ended: Ending | None = None
        """Why no more operations are taken; None as long as they are."""
        self._tied: list[weakref.ref[Progress]] = []
        self._queue: deque[Operation] = deque()
        self._lock = threading.Lock()
        self._waiting = False
        self._work = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        _all.add(self)
        if threaded:
            # The thread must not keep alive what nobody has any more.
            serve = _serve, (weakref.ref(self), self._work)
            self._thread = threading.Thread(target=serve[0], args=serve[1], name="commlab progress", daemon=True)
            self._thread.start()
            weakref.finalize(self, self._work.set).atexit = False

    @property
    def threaded(self) -> bool:
        return self._thread is not None

    def submit(self, operation: Operation, awaited: bool = False) -> Handle:
        """Append an operation and start it if nothing is before it. ``awaited``: the caller goes on to wait for it;
        it is moved on here for a while, and the thread, which would only want the GIL for nothing, sleeps on."""
        if awaited and self.take():
            try:
                ended = self._step(operation)
                stop_s = time.perf_counter() + SPIN_S
                while not (ended or hasattr(operation.waits_for, "block") or time.perf_counter() > stop_s):
                    os.sched_yield()
                    ended = self._step(operation)
                if not ended:
                    self.put_first(operation)
            finally:
                self.leave()
            return operation.handle
        self._queue.append(operation)
        try:
            self.poll()
        finally:
            if self._queue:  # most operations on one node have ended by now
                self._register()
        if not awaited and self._thread is not None:
            self._work.set()
        return operation.handle

    def put_first(self, operation: Operation) -> None:
        """Queue an operation that has begun between :meth:`take` and :meth:`leave`: what another thread has appended
        meanwhile comes after it."""
        self._queue.appendleft(operation)
        self._register()

    def _register(self) -> None:
        """Let others move this queue on, where it has no thread of its own."""
        if self._thread is None:
            begin_moving(self)
            if not self._queue:  # another thread has ended what there was
                stop_moving(self)

    def all_begun(self) -> bool:
        """Whether every operation that was submitted has been announced to the others."""
        # Whatever begins ahead of its turn begins after all before it: so the last one tells. In the middle of a loop
        # another thread may end the first ones.
        try:
            return self._queue[-1].begun
        except IndexError:
            return True

    def take(self) -> bool:
        """Whether nothing is under way, and operations are taken; then nothing starts before :meth:`leave`."""
        if self._queue or self.ended is not None or not self._lock.acquire(blocking=False):
            return False
        if self._queue:
            self._lock.release()
            return False
        return True

    def attach(self, standing: Any) -> None:
        """Let native code do what :meth:`take` and :meth:`leave` do (:class:`.at_once.Standing`)."""
        standing.attach(self, self._queue, self._lock.acquire, self._lock.release)

    def leave(self) -> None:
        """End what :meth:`take` began."""
        self._lock.release()

    def poll(self) -> None:
        """Move on without waiting."""
        if not self._queue and self._thread is None:
            return
        if self._lock.acquire(blocking=False):
            try:
                self._advance()
            finally:
                self._lock.release()

    def _advance(self) -> Operation | None:
        """Advance the queue's head, and the next ones while they end; returns the one that has to wait."""
        while self._queue:
            head = self._queue[0]
            if not self._step(head):
                return head
            if self._queue:
                self._queue.popleft()
        if self._thread is not None:
            self._work.clear()
        if id(self) in under_way:
            stop_moving(self)
        # What was submitted between the last look at the queue and now has set the flag in vain.
        if self._queue:
            self._work.set()
            self._register()
        return None

    def _step(self, operation: Operation) -> bool:
        """Go on with an operation; returns whether it has ended. The queue ends with one that breaks off."""
        try:
            ended = operation.advance()
        except BaseException:
            self._break_off(operation)
            raise
        if ended and operation.handle.error is not None:
            self._break_off(operation)
        return ended

    def _break_off(self, operation: Operation) -> None:
        error = operation.handle.error
        if error is None or isinstance(error, HARMLESS):
            return
        kept.append((operation, error))
        self.end(ended_by(error, operation.handle.describe()))
        while self._queue:
            dropped = self._queue.popleft()
            if dropped is not operation and not dropped.handle.finished:
                assert self.ended is not None
                dropped.handle.finish(self.ended.error(dropped.handle.describe(), self.rank))

    def head(self) -> Operation | None:
        """The operation that moves next, or that waits for others; None where nothing is under way."""
        try:
            return self._queue[0]
        except IndexError:
            return None

    def rest(self, timeout_s: float, idle_s: float) -> None:
        """Wait for the head of the queue, for ``timeout_s`` at most: natively where its request knows how. ``idle_s``:
        how long nothing has moved. For a thread that moves on several queues; PeerLostError like a wait's."""
        with self._lock:
            head = self.head()
            block = None if head is None else getattr(head.waits_for, "block", None)
            if block is not None:
                try:
                    block(timeout_s)
                except PeerLostError as error:
                    assert head is not None
                    raise head.lost(error) from error
                return
        pause(idle_s)

    def tie(self, other: Progress) -> None:
        """What ends one of the two queues ends the other."""
        self._tied.append(weakref.ref(other))
        other._tied.append(weakref.ref(self))

    def _ties(self) -> list[Progress]:
        """The queues that are tied to this one, and that somebody still has."""
        return [tied for reference in self._tied if (tied := reference()) is not None]

    def end(self, ended: Ending) -> None:
        """Take no more operations from now on; the first reason counts."""
        if self.ended is None:
            self.ended = ended
            for tied in self._ties():
                tied.end(ended)

    def _resume(self, ended: Ending) -> None:
        if self.ended is ended:
            self.ended = None
            for tied in self._ties():
                tied._resume(ended)

    def drive(self, handle: Handle, timeout_s: float | None = None) -> None:
        """Wait for ``handle`` (and all before it), moving the queue on. PeerTimeoutError when nothing has moved for
        ``timeout_s``; a warning that names the silent peer after 10 s. A wait that gives up ends the queue; the
        operation stays under way, and once it has been waited for to its end after all, the queue goes on."""
        ended = self.ended
        if ended is not None and not handle.given_up:
            raise ended.error(handle.describe(), self.rank)
        self._waiting = True
        try:
            limit_s = self.timeout_s if timeout_s is None else timeout_s
            wait_until(lambda: handle.finished, _Caller(self, handle), limit_s)
        except BaseException as error:
            if not handle.finished and self.ended is None:
                kept.append(self._queue)
                handle.given_up = True
                self.end(ended_by(error, handle.describe()))
            raise
        finally:
            self._waiting = False
        if ended is not None:
            handle.given_up = False
            if handle.error is None or isinstance(handle.error, HARMLESS):
                self._resume(ended)

    def serve(self) -> None:
        """Move on what is under way, until nothing is. In a thread of its own."""
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
        """Stop the thread, and take no more operations. Those still in the queue are dropped."""
        self._closed = True
        stop_moving(self)
        if self.ended is None:
            self.ended = Ending(UsageError, "was shut down")
        self._work.set()
        if self._thread is not None:
            self._thread.join(timeout=5)


def _serve(reference: weakref.ref[Progress], work: threading.Event) -> None:
    """The thread of a queue: asleep while nothing is under way; ends when nobody has the queue any more."""
    while True:
        work.wait()
        progress = reference()
        if progress is None or progress._closed:
            return
        progress.serve()
        del progress


class _Caller:
    """A caller that moves the queue on while it waits for ``handle``."""

    def __init__(self, progress: Progress, handle: Handle):
        self._progress = self.driver = progress
        self._handle = handle
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
        # The request knows how to wait by itself. Back every 0.1 s: for signals, and to see who is silent; sooner where
        # others have to be moved on.
        with self._progress._lock:
            try:
                block(1e-3 if others_move(self._progress) else 0.1)
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
