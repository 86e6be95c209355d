"""What torch.distributed holds of an operation under way: a ``Work`` over a commlab handle."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from ..errors import PeerTimeoutError
from ..runtime.handle import Handle
from .backward import AtEnd, caller_of

# The stubs have every version's names and overloads at once, which no class could satisfy.
_ProcessGroup: Any = dist.ProcessGroup


class Futures:
    """Completes the futures of one group in the order in which they were asked for. ``threaded``: by a thread of its
    own, started with the first one; else whoever asks for a future waits for its operation, because where no core is
    free a thread would only take one from the computation. Those of DDP's buckets wait ``at_end`` of backward then."""

    def __init__(self, threaded: bool):
        self.threaded, self.at_end = threaded, AtEnd()
        self._posted: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def post(self, complete: Callable[[], None]) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, daemon=True, name="commlab futures")
                self._thread.start()
        self._posted.put(complete)

    def _serve(self) -> None:
        while (complete := self._posted.get()) is not None:
            complete()
            # Nothing may be kept alive by the wait for the next one.
            del complete

    def close(self) -> None:
        """End the thread, once all futures are complete."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            self._posted.put(None)
            thread.join(timeout=5)


@cache
def torch_keeps_works() -> bool:
    """Whether C++ that is given a work keeps the half of it that is written in Python. torch 2.6 does not: that half
    went as soon as nothing in Python held it, and what C++ then waited for never ended."""

    class Work(dist._Work):
        def get_future(self) -> Any:
            future: Any = torch.futures.Future()
            future.set_result(None)
            return future

    class Answering(_ProcessGroup):  # type: ignore[misc]
        def barrier(self, opts: Any = None) -> Any:
            return Work()

    try:
        _ProcessGroup.barrier(Answering(0, 1), dist.BarrierOptions()).get_future()
    except RuntimeError:
        return False
    return True


class Kept:
    """The works of a group that C++ may still ask for something, where torch does not keep them: until they are waited
    for or their future is asked for. Of those that have ended and that nobody asked, the last ``limit``: whoever waits
    in C++ (DDP's reducer, a functional collective) does so before that many others were started."""

    def __init__(self, limit: int = 4096):
        self._limit = limit
        self._works: dict[int, CommlabWork] = {}

    def __len__(self) -> int:
        return len(self._works)

    def keep(self, work: CommlabWork) -> None:
        work.kept = self
        self._works[id(work)] = work
        if len(self._works) > self._limit:
            # In the order in which they were started.
            oldest = next(iter(self._works.values()))
            if oldest.is_completed():
                self.let_go(oldest)

    def let_go(self, work: CommlabWork) -> None:
        work.kept = None
        self._works.pop(id(work), None)


class CommlabWork(dist._Work):
    """An operation of a process group. ``handles``: what it consists of, in order; ``after()``: what remains to be done
    here when all of them have ended, once. ``value``: the tensors that :meth:`result` and the future give. ``span``: of
    torch's profile, which ends with the operation."""

    kept: Kept | None = None

    def __init__(
        self,
        futures: Futures,
        handles: Sequence[Handle],
        value: Any,
        after: Callable[[], None] | None = None,
        span: Any = None,
    ):
        super().__init__()
        self._futures, self.handles, self._value, self._after = futures, tuple(handles), value, after
        self._span = span
        self._ended = not handles and after is None and span is None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._future: Any = None

    def _finish(self, timeout_s: float | None = None) -> None:
        if not self._ended:
            with self._lock, torch.no_grad():
                self._end(timeout_s)
        if self._error is not None:
            raise self._error

    def _end(self, timeout_s: float | None) -> None:
        """Wait, and do what remains; one thread at a time."""
        if not self._ended:
            try:
                for handle in self.handles:
                    handle.wait(timeout_s)
                if self._after is not None:
                    self._after()
            except PeerTimeoutError as error:
                # The operation may still end.
                raise PeerTimeoutError(f"{error} of init_process_group, new_group or wait()") from error
            except BaseException as error:
                if all(handle.finished for handle in self.handles):
                    self._error, self._ended = error, True
                raise
            if self._span is not None:
                self._end_span()
            self.handles, self._after, self._ended = (), None, True

    def _end_span(self) -> None:
        """In another thread, which makes the span an asynchronous one: others begin in it and end after it."""
        span, self._span = self._span, None
        thread = threading.Thread(target=span.set_result, args=(None,))
        thread.start()
        thread.join()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """True once the operation has ended; raises what went wrong. ``timeout``: none or zero is the group's."""
        if self.kept is not None:
            self.kept.let_go(self)
        seconds = timeout.total_seconds() if timeout is not None else 0.0
        self._finish(seconds if seconds > 0 else None)
        return True

    def is_completed(self) -> bool:
        if not self._ended and all(handle.done() for handle in self.handles):
            try:
                self._finish()
            except Exception:
                return True
        return self._ended

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        """Of a receive from anybody; none of those is a work of this class."""
        return -1

    _source_rank = source_rank

    def result(self) -> Any:
        self.wait()
        return self._value

    def get_future(self) -> Any:
        """A future of :meth:`result`'s value. Errors are raised in a callback of it: one that is set in Python is not
        known to C++, and DDP's reducer would take a failed bucket for a whole one."""
        if self.kept is not None:
            self.kept.let_go(self)
        if self._future is None:
            # Built-in hooks of DDP want a future that knows its type. Only one that is complete can be made from
            # Python, and only 16 bits go through such a hook.
            base: Any = torch.futures.Future()
            futures = self._futures
            if self._ended or _is_halves(self._value):
                self._complete_now()
            elif futures.threaded:
                self._future = base.then(self._outcome)
                futures.post(lambda: self._complete(base))
            elif futures.at_end.put_off(lambda: self._complete(base), caller_of(1)):
                self._future = base.then(self._outcome)
            else:
                self._complete_now()
        return self._future

    def _complete_now(self) -> None:
        self._futures.at_end.complete_all()
        try:
            self._finish()
        except Exception:
            base: Any = torch.futures.Future()
            self._future = base.then(self._outcome)
            base.set_result(None)
        else:
            self._future = torch._C.fork(lambda: self._value)  # complete when it returns, and typed

    def _complete(self, base: Any) -> None:
        try:
            self._finish()
        except BaseException as error:
            self._error = error
        base.set_result(None)

    def _outcome(self, _: Any) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


def _is_halves(value: Any) -> bool:
    return bool(value) and isinstance(value[0], torch.Tensor) and value[0].dtype in (torch.float16, torch.bfloat16)
