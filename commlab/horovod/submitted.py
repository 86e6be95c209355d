"""What this rank was asked for and the others do not know of yet, in order, and which foreseen batches it completes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence

from .announcement import Announcement
from .foreseen import ForeseenBatch, Promise, unnumbered
from .submission import Submission


class Submitted:
    """Filled by the program's threads, emptied by the engine's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Submission] = deque()
        self._batches: Mapping[Announcement, ForeseenBatch] = {}
        self._awaited = 0
        """How many of those that wait belong to a foreseen batch."""
        self._complete: list[ForeseenBatch] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, submission: Submission) -> bool:
        """Append an operation; whether the engine's thread has something to do because of it."""
        with self._lock:
            self._waiting.append(submission)
            return not self._count(submission)

    def _count(self, submission: Submission) -> bool:
        """Enter it in its batch; whether that batch now waits for more."""
        if not self._batches:
            return False
        pattern = unnumbered(submission.request)
        batch = self._batches.get(pattern)
        if batch is None or pattern in batch.here:
            return False
        batch.here[pattern] = submission
        self._awaited += 1
        if len(batch.here) < len(batch.patterns):
            return True
        self._complete.append(batch)
        return False

    def foresee(self, batches: Mapping[Announcement, ForeseenBatch]) -> None:
        """From now on ``batches`` are foreseen, by pattern."""
        with self._lock:
            self._batches = dict(batches)
            self._recount()

    def _recount(self) -> None:
        self._complete.clear()
        self._awaited = 0
        for batch in self._batches.values():
            batch.here.clear()
        for submission in self._waiting:
            self._count(submission)

    @property
    def complete(self) -> bool:
        """Whether all of a foreseen batch is here."""
        return bool(self._complete)

    @property
    def incomplete(self) -> bool:
        """Whether all that is here belongs to foreseen batches of which more will come."""
        return not self._complete and self._awaited == len(self._waiting)

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for one of them: nothing is to be gained by waiting for more."""
        with self._lock:
            return any(submission.urgent for submission in self._waiting)

    def since_s(self) -> float:
        """When the oldest operation was submitted."""
        return self._waiting[0].since_s

    def size_bytes(self) -> int:
        """Of all the tensors."""
        with self._lock:
            waiting = list(self._waiting)
        return sum(tensor.numel() * tensor.element_size() for each in waiting for tensor in each.tensors)

    def take_batch(self) -> Promise | None:
        """Take out a foreseen batch that is complete."""
        with self._lock:
            if not self._complete:
                return None
            batch = self._complete.pop(0)
            submissions = [batch.here[pattern] for pattern in batch.patterns]
            batch.here.clear()
            self._awaited -= len(submissions)
            for submission in submissions:
                submission.taken = True
            taken = {id(submission) for submission in submissions}
            self._waiting = deque(each for each in self._waiting if id(each) not in taken)
            if self._awaited < len(self._waiting):
                self._recount()  # the same request may have come twice
            return Promise(batch, submissions)

    def take_all(self) -> list[Submission]:
        """Take out everything, in order."""
        with self._lock:
            found = list(self._waiting)
            for submission in found:
                submission.taken = True
            self._waiting.clear()
            self._recount()
            return found

    def put_back(self, submissions: Sequence[Submission]) -> None:
        """Undo :meth:`take_batch`."""
        with self._lock:
            for submission in submissions:
                submission.taken = False
            self._waiting.extendleft(reversed(submissions))
            self._recount()

    def clear(self) -> None:
        self.take_all()
