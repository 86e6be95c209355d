"""The negotiation of one process set: ranks announce what is ready, and carry out in one order what is ready on all.

A *tick* is one exchange among the set's ranks: each tells which operations have become ready there since its last one.
All ranks keep the same table from the same announcements (:mod:`.announced`), so nobody leads. A rank takes part in a
tick while it has something under way or has joined, and is asleep otherwise: nobody is asked when nothing is wanted.
What a training loop asks for in every step needs no tick once the ranks foresee it (:mod:`.foreseen`).

The set's operations, ticks included, run one after the other on one group. While one runs, more becomes ready, and
travels together afterwards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Any

import torch

from .. import trace
from ..errors import CommlabError, PeerTimeoutError, UsageError
from ..runtime.ending import HARMLESS, ended_by
from ..runtime.group import Group
from ..runtime.handle import Handle
from .announced import Announced, Heard, Ready
from .announcement import Announcement
from .foreseen import GATHERED_BYTES, Foreseen, Promise
from .settings import Settings
from .stalls import Stalls
from .submission import HorovodInternalError, Submission
from .submitted import Submitted
from .tick import Waits, tell, until

_BACK_OFF_S, _LONGEST_BACK_OFF_S = 1e-3, 20e-3
_LONGEST_GATHERING_S = 20e-3
"""Of operations that nobody waits for yet."""
_PATIENCE_S, _LONGEST_PATIENCE_S = 0.25, 10.0
"""With the rest of a foreseen batch that nobody waits for yet: doubled where that was too short."""
_RETRIES = 8
"""Of a tick in whose place other ranks had foreseen something; they tick next."""


class Channel:
    """``group``: the ranks of the set; ``ranks``: their numbers in the job. Everything but :meth:`submit` is called by
    the engine's thread alone."""

    def __init__(self, group: Group, ranks: Sequence[int], settings: Settings, perform: Any):
        """``perform(channel, batch)``: carries out what is ready."""
        self.group, self.ranks, self.settings = group, tuple(ranks), settings
        self.rank = self.ranks[group.rank]
        self._perform = perform
        self.submitted = Submitted()
        self.submissions: dict[str, Submission] = {}
        """This rank's operations under way, by name."""
        self.waited = False
        """Whether somebody has waited for an operation since the last one was submitted."""
        self.joining: Submission | None = None
        self.leaving = ""
        """Why this rank tells the others, with its next tick, that it takes part no longer."""
        self.ended: BaseException | None = None
        self.ticks = self.foreseen = self.missed = 0
        """How many ticks there were, and how many batches that were carried out without one, or foreseen in vain."""
        self.waits_for: Handle | None = None
        self.wake_s: float | None = None
        """When the channel wants to be asked again, though nothing has happened."""
        self.buffers: dict[str, torch.Tensor] = {}
        self._announced = Announced(self.ranks, self.rank)
        self._foreseen = Foreseen(settings.fusion_bytes)
        self._patience_s = _PATIENCE_S
        self._quiet_since_s: float | None = None
        self._spent_s = 0.0
        """How long the last tick and what it carried out took: operations that nobody waits for are gathered as long,
        so that at most half of the time goes to ticks."""
        self._backed_off_until_s = 0.0
        self._stalls = Stalls(self.rank, settings)
        self._join_announced = False
        self._carried: list[Ready] = []
        """What is being carried out, or about to be."""
        self._moved_s = time.monotonic()
        self._run = self._negotiate()

    def submit(self, submission: Submission) -> bool:
        """Take an operation of this rank; whether the engine's thread has to know of it now. The caller holds the
        engine's lock. UsageError where the name is in use, HorovodInternalError where nothing is taken any more."""
        name = submission.request.name
        if self.ended is not None:
            raise HorovodInternalError(str(self.ended)) from self.ended
        if name in self.submissions:
            raise UsageError(
                f"rank {self.rank}: {submission.request.text()} has the name {name!r}, which another operation under "
                "way has too; give each its own name, or wait for the first one"
            )
        self.submissions[name] = submission
        submission.anew, self.waited = self.waited, False
        return self.submitted.put(submission)

    def step(self) -> bool:
        """Go on as far as possible without waiting; whether anything has moved."""
        moved = False
        while self.ended is None and (self.waits_for is None or self.waits_for.done()):
            try:
                self.waits_for = next(self._run)
            except StopIteration:
                return True
            except BaseException as error:
                self.fail(error)
                return True
            if self.waits_for is None:
                break
            moved = True
        if moved:
            self._moved_s = time.monotonic()
        return moved

    def block(self, timeout_s: float, idle_s: float) -> None:
        """Wait, natively where that is possible, for what the channel waits for."""
        try:
            self.group.progress.rest(timeout_s, idle_s)
        except CommlabError as error:
            self.group.progress.end(ended_by(error, "an operation of Horovod's"))
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End all that is under way with ``error``, and take nothing more."""
        self.ended = error
        self.waits_for = None
        submissions = [*self.submissions.values(), *([self.joining] if self.joining is not None else [])]
        submissions += [each.submission for each in self._carried if each.submission is not None]
        self._carried.clear()
        self.submissions.clear()
        self.submitted.clear()
        self.joining = None
        for submission in submissions:
            if not submission.ended:
                submission.end(error)

    def _negotiate(self) -> Waits:
        while True:
            while not self._due():
                yield None
            began_s = time.monotonic()
            promise = self.submitted.take_batch() if self._may_foresee() else None
            if promise is None:
                yield from self._tick()
            elif not (yield from self._keep(promise)):
                yield from self._tick(promise.batch.patterns[0])
            if self.ended is not None:
                return
            promise = None  # with it the step's gradients would be kept until the next step
            self._spent_s = min(_LONGEST_GATHERING_S, time.monotonic() - began_s)

    def _tick(self, missed: Announcement | None = None) -> Waits:
        """``missed``: of a batch that this rank has just foreseen in vain."""
        if self.settings.mark_cycles:
            now_ns = time.perf_counter_ns()
            trace.record("CYCLE_START", "cycles", now_ns, now_ns)
        self.ticks += 1
        record = self._announcement(missed)
        for _ in range(_RETRIES):
            try:
                records = yield from tell(self.group, record)
                break
            except HARMLESS as error:
                # Others had foreseen a batch, or refuse what this rank has carried out: they tick next.
                failed = error
        else:
            raise failed
        heard = self._hear(records)
        if heard.left:
            self.fail(HorovodInternalError(heard.left))
            return
        ready = self._announced.take_ready(self.submissions)
        if self.group.size > 1 and not self._announced.anybody_joined:
            changed = [self._foreseen.missed(pattern) for pattern in heard.missed]
            if self._foreseen.learn(ready, self.group.size) or any(changed):
                self.submitted.foresee(self._foreseen.batches)
        yield from self._carry_out(ready)
        self._end_join()

    def _may_foresee(self) -> bool:
        return not (self.leaving or self.joining is not None or self._announced.anybody_joined)

    def _due(self) -> bool:
        """Whether this rank takes part in the next tick now, or carries out what it foresees."""
        now_s = time.monotonic()
        self.wake_s = None
        if self.leaving or (self.joining is not None and not self._join_announced):
            return True
        due = []
        if self.submitted:
            if self.submitted.urgent or (self.submitted.complete and self._may_foresee()):
                return True
            if self.submitted.incomplete and self._may_foresee():
                due.append(self.submitted.since_s() + self._patience_s)
                if now_s >= due[0]:
                    self._patience_s = min(2 * self._patience_s, _LONGEST_PATIENCE_S)
            elif self.submitted.size_bytes() >= GATHERED_BYTES:
                return True
            else:
                due.append(self.submitted.since_s() + max(self.settings.cycle_s, self._spent_s))
        if self._announced.under_way or self.joining is not None:
            due.append(self._backed_off_until_s)
        if due and now_s < min(due):
            self.wake_s = min(due)
        return self.wake_s is None and bool(due)

    def _announcement(self, missed: Announcement | None) -> bytes:
        message = self._announced.message(self.submitted.take_all())
        if missed is not None:
            message["missed"] = missed
        if self.joining is not None and not self._join_announced:
            message["join"] = self.joining.request.detail
            self._join_announced = True
        if self.leaving:
            message["left"] = self.leaving
        return json.dumps(message, separators=(",", ":")).encode() if message else b""

    def _hear(self, records: Sequence[bytes]) -> Heard:
        """Enter what the ranks have announced."""
        now_s = time.monotonic()
        heard = self._announced.hear(records)
        if heard.anything:
            self._quiet_since_s, self._backed_off_until_s = None, 0.0
        else:
            self._quiet_since_s = self._quiet_since_s or now_s
            quiet_s = now_s - self._quiet_since_s
            self._backed_off_until_s = now_s + min(max(_BACK_OFF_S, quiet_s / 20), _LONGEST_BACK_OFF_S)
        return heard

    def _carry_out(self, ready: list[Ready]) -> Waits:
        self._carried = ready
        for batch in self._perform.batches(self, ready):
            yield from self._carry_out_one(batch, None)
        self._carried = []

    def _keep(self, promise: Promise) -> Generator[Handle | None, None, bool]:
        """Carry out a foreseen batch, unless the others have not foreseen it: then nothing has happened, and its
        operations are to be announced. Whether it was carried out."""
        peers = range(self.group.size)
        batch = [Ready(each.request, dict.fromkeys(peers, each.request), each, False) for each in promise.submissions]
        self._carried = batch
        yield from self._carry_out_one(batch, promise)
        self._carried = []
        if promise.kept:
            self.foreseen += 1
        else:
            self.missed += 1
            self.submitted.put_back(promise.submissions)
        return promise.kept

    def _carry_out_one(self, batch: Sequence[Ready], promise: Promise | None) -> Waits:
        def missed() -> bool:
            return promise is not None and not promise.kept

        try:
            yield from self._perform.run(self, batch, promise)
        except HARMLESS as error:
            if not missed():
                self._end(batch, error)
        except BaseException as error:
            if not missed():
                self._end(batch, error)
            if self.group.progress.ended is not None:
                raise
            # The others wait for this rank's part, or will: they are told.
            refused = self.group.refuse(batch[0].request.kind, batch[0].request.name, _as_error(error))
            with suppress(*HARMLESS):
                yield from until(refused)
            if missed():
                for each in batch:
                    assert each.submission is not None
                    each.submission.request = each.request._replace(refused=str(error), named=False)
        else:
            self._end(batch, None)

    def _end(self, batch: Sequence[Ready], error: BaseException | None) -> None:
        for each in batch:
            submission = each.submission
            if submission is not None and not submission.ended:
                # Before its caller knows, who may use the name again at once.
                if self.submissions.get(each.request.name) is submission:
                    del self.submissions[each.request.name]
                submission.end(error)

    def _end_join(self) -> None:
        if self.joining is None or (ended := self._announced.end_join()) is None:
            return
        submission, self.joining, self._join_announced = self.joining, None, False
        submission.finish = lambda _: ended
        submission.end()

    def inspect(self, now_s: float) -> None:
        """Warn of operations that some ranks do not announce, with the ranks; PeerTimeoutError, to all that wait here,
        when that has lasted too long."""
        if self._carried and self.waits_for is not None and now_s - self._moved_s > self.settings.timeout_s:
            waits = f"rank {self.rank} has waited {now_s - self._moved_s:.1f} s for ranks {self._silent()}"
            error: Exception = PeerTimeoutError(f"{waits} in {self.waits_for.describe()}")
            self.group.progress.end(ended_by(error, self.waits_for.describe()))
            self.fail(error)
        reason = self._stalls.inspect(
            now_s,
            {name: now_s - submission.since_s for name, submission in self.submissions.copy().items()},
            self._announced.lacking,
            self._silent,
        )
        if reason:
            error = PeerTimeoutError(f"rank {self.rank} gave up: {reason}, or the timeout be raised")
            for name, submission in self.submissions.copy().items():
                del self.submissions[name]
                submission.end(error)
            self.submitted.clear()
            self.leaving = f"has given up: {reason}"

    def _silent(self) -> list[int]:
        """The ranks that the operation under way waits for."""
        head = self.group.progress.head() if self.waits_for is not None else None
        return [] if head is None else [self.ranks[peer] for peer in head.peers()]


def _as_error(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else CommlabError(type(error).__name__)
