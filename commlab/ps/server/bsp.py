"""BSP on a server: rounds become updates, and all servers agree on the norm first where they must.

A slice is updated as soon as its round is complete (:mod:`commlab.ps.server.rounds`). Where the rules demand that
servers agree, all slices of all servers are updated together instead: once all workers have ended the clock, each
server sends the others its verdict, which is the squares of its share of the gradient and whether the share is finite.
A server updates when it has all verdicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...native.norm import clip_factor, norm_squared
from ..frames import Entry
from ..messages import Header, Kind
from .ledger import Ledger, Waiting
from .reads import Reads
from .rounds import Rounds
from .shard import OwnedSpan


class BSP:
    """The synchronization of :class:`commlab.ps.server.server.Server` under BSP. A read waits for the end of a round of
    the slice that is furthest behind, so slices are the events of :class:`Reads`."""

    def __init__(self, ledger: Ledger, reads: Reads):
        self._ledger, self._reads = ledger, reads
        self._rounds = Rounds(ledger.shard, ledger.names)
        self._taken: list[int] = []
        """Slices that the frame which is being taken in has numbers of."""
        self._refused: dict[int, str] = {}
        """By worker: why the push whose bytes are on their way will be refused; empty if it will not."""
        self._complete: list[int] = []
        """Slices whose round is complete, while the servers have not agreed."""
        self._agreed = 0
        """How many clocks all servers have agreed on."""
        self._gave_verdict = False
        """Whether the other servers were sent this server's verdict on the clock that is to be agreed on."""
        self._finite: dict[int, bool] = {}
        """By clock: whether all that workers pushed was finite, as far as they have ended the clock."""
        self._verdicts: dict[int, dict[int, tuple[float, bool]]] = {}
        """By clock and server: the squares of the server's share of the gradient, and whether the share is finite."""

    # Pushes.

    def memory_for(self, worker: int, header: Header) -> torch.Tensor | None:
        """Memory for the numbers of a push: the worker's slot; None while the round of the push is not open."""
        entry = header.key, header.slices
        reason = self._refused[worker] = self._against(worker, header) or self._against_holding(worker, header, [entry])
        if reason:
            return self._ledger.scratch(worker, header.length)
        if self._holds(worker, header, [entry]):
            return None
        span = self._ledger.shard.span(header.key, header.slices)
        assert span is not None and header.dtype is not None
        return self._rounds.slot(worker, header.dtype, *span).view(torch.uint8)

    def take(self, worker: int, header: Header, data: torch.Tensor) -> str:
        """Take in a push, whose numbers are in the slot. Returns why the push is refused; empty if it is not."""
        # What was refused before the numbers came has none in the slot.
        reason = self._refused.pop(worker, "") or self._against(worker, header)
        if not reason:
            slices = range(header.key, header.key + header.slices)
            self._rounds.take(worker, header.clock, slices, header.dtype, self._ledger.workers[worker].hypers)
            self._add(slices)
        return reason

    def _against(self, worker: int, header: Header, *, sized: bool = True) -> str:
        reason = self._ledger.against_push(worker, header, sized=sized)
        return reason or self._rounds.against(worker, header, self._ledger.workers[worker].hypers)

    def ready(self, worker: int, header: Header, entries: Sequence[Entry]) -> bool:
        """Whether the rounds of all entries of a frame of pushes are open, or some never will be."""
        self._refused[worker] = self._against_holding(worker, header, entries)
        return bool(self._refused[worker]) or not self._holds(worker, header, entries)

    def against(self, worker: int, header: Header) -> str:
        """Why a span of a frame can't be taken in; empty if it can."""
        reason = self._against(worker, header, sized=False)
        if not reason and self._rounds.is_ahead(header.clock, [(header.key, header.slices)]):
            reason = self._refused.get(worker) or self._against_holding(worker, header, [(header.key, header.slices)])
            assert reason, "frames are taken in when all their rounds are open"
        return reason

    def take_span(self, worker: int, header: Header, span: OwnedSpan, numbers: torch.Tensor | None) -> None:
        """Take in one span of a frame; None: the worker has no gradient of these slices."""
        wire = None if numbers is None else numbers.dtype
        if numbers is not None:
            self._rounds.slot(worker, numbers.dtype, span.dtype, span.where).copy_(numbers)
        self._rounds.take(worker, header.clock, span.indices, wire, self._ledger.workers[worker].hypers)
        self._taken += span.indices

    def end_frame(self, worker: int, header: Header) -> None:
        """Go on with the rounds of all slices of a frame."""
        self._refused.pop(worker, "")
        taken, self._taken = self._taken, []
        self._add(taken)

    def _holds(self, worker: int, header: Header, entries: Sequence[Entry]) -> bool:
        """Whether a push must wait for its round; then it is remembered."""
        if self._rounds.is_ahead(header.clock, entries):
            self._ledger.held.setdefault(worker, Waiting(worker, header, self._ledger.now_s))
            return True
        self._ledger.held.pop(worker, None)
        return False

    def _against_holding(self, worker: int, header: Header, entries: Sequence[Entry]) -> str:
        """Why a push would wait for its round in vain; empty if it would not."""
        ledger = self._ledger
        reason: str = ledger.given_up.pop(worker, "")
        if not reason and any(state.left for state in ledger.workers):
            for first, slices in entries:
                for index in range(first, first + slices):
                    if not reason and self._rounds.completed[index] < header.clock:
                        reason = self._against_waiting(worker, header.clock, index)
        if reason:
            ledger.held.pop(worker, None)
        return reason

    # Rounds become updates.

    def _add(self, slices: Iterable[int]) -> None:
        complete = self._rounds.add(slices, [worker.clock for worker in self._ledger.workers])
        if self._ledger.rules.agrees:
            self._complete += complete
        elif complete:
            self._end_rounds(complete, 1.0)

    def _end_rounds(self, slices: list[int], clipping: float, *, updates: bool = True) -> None:
        """Update those of ``slices`` that any worker pushed, and answer the reads that wait for them."""
        completed, added = self._rounds.completed, self._rounds.added
        for clock in sorted({completed[index] for index in slices}):
            ended = [index for index in slices if completed[index] == clock]
            if updates:
                self._update([index for index in ended if added[index]], clock, clipping)
            self._rounds.end(ended)
        if self._reads.queues:
            for waiting in self._reads.take(slices):
                self._read(waiting.worker, waiting.header, (waiting.first, waiting.slices), waiting.since_s)
        if self._reads.allowed:
            self._reads.answer()
        # All workers may have ended the next clock too, without a push.
        self._add(slices)

    def _update(self, slices: list[int], clock: int, clipping: float) -> None:
        """Update ``slices`` with the means of clock ``clock``: all slices that the same workers pushed at once."""
        if not slices:
            return
        rounds, shard = self._rounds, self._ledger.shard
        hypers = rounds.hypers[clock][1]
        factor = clipping / hypers.scale
        by_workers: dict[tuple[int, ...], list[int]] = {}
        for index in slices:
            by_workers.setdefault(tuple(rounds.added[index]), []).append(index)
        for workers, together in by_workers.items():
            together.sort()
            shard.update([(span, rounds.mean(span)) for span in shard.spans(together)], hypers.groups, factor)
            self._ledger.record(together, [(worker, clock, 0) for worker in workers], hypers, factor)

    # Reads.

    def read(self, worker: int, header: Header, entries: Iterable[Entry]) -> None:
        """Answer reads now, or when the rounds that each waits for have ended; refuse reads that would wait in vain."""
        for entry in entries:
            self._read(worker, header, entry, self._ledger.now_s)
        self._refuse_hopeless()

    def _read(self, worker: int, header: Header, entry: Entry, since_s: float) -> None:
        completed, (behind, slices) = self._rounds.completed, entry
        if slices > 1:
            behind = min(range(behind, behind + slices), key=completed.__getitem__)
        self._reads.read(worker, header, entry, since_s, completed[behind], behind)

    # Clocks.

    def end_clock(self, worker: int, header: Header) -> None:
        """A worker has ended clock ``header.clock``: what it has not pushed in this clock counts as zero."""
        if self._ledger.rules.agrees:
            self._finite[header.clock] = self._finite.get(header.clock, True) and header.flag
            self._ledger.ends.append(Waiting(worker, header, self._ledger.now_s))
        else:
            self._ledger.acknowledge(worker, header)
        self._add(range(len(self._ledger.shard.slices)))
        self._agree()
        self._refuse_hopeless()

    def take_verdict(self, server: int, header: Header) -> None:
        """Take in another server's verdict on clock ``header.clock``."""
        self._verdicts.setdefault(header.clock, {})[server] = header.value, header.flag
        self._agree()

    def _agree(self) -> None:
        """Send the other servers this server's verdict once all workers have ended the clock, and update once all
        verdicts are there."""
        clock, rules = self._agreed, self._ledger.rules
        if not rules.agrees or min(worker.clock for worker in self._ledger.workers) <= clock:
            return
        verdicts = self._verdicts.setdefault(clock, {})
        if not self._gave_verdict:
            verdicts[self._ledger.index] = self._give_verdict(clock)
        if len(verdicts) < rules.servers:
            return
        squares = sum(verdicts[server][0] for server in range(rules.servers))
        finite = all(good for _, good in verdicts.values())
        del self._verdicts[clock]
        self._agreed, self._gave_verdict = clock + 1, False
        scale = self._rounds.hypers[clock][1].scale if clock in self._rounds.hypers else 1.0
        complete, self._complete = self._complete, []
        # The answers first: who asks for the norm need not wait for the update.
        for waiting in [waiting for waiting in self._ledger.ends if waiting.header.clock == clock]:
            self._ledger.ends.remove(waiting)
            self._ledger.acknowledge(waiting.worker, waiting.header, value=squares, flag=finite)
        clipping = clip_factor(squares**0.5 / scale, rules.max_grad_norm)
        self._end_rounds(complete, clipping, updates=finite or not rules.skips)
        self._agree()

    def _give_verdict(self, clock: int) -> tuple[float, bool]:
        ledger, rounds = self._ledger, self._rounds
        assert len(self._complete) == len(ledger.shard.slices)
        pushed = sorted(index for index in self._complete if rounds.added[index])
        squares = norm_squared(rounds.mean(span) for span in ledger.shard.spans(pushed))
        finite = self._finite.pop(clock) and squares - squares == 0.0
        verdict = Header(Kind.VERDICT, clock=clock, value=squares, flag=finite)
        others = [server for server in range(ledger.rules.servers) if server != ledger.index]
        ledger.outbox += [(ledger.rules.workers + server, verdict, None) for server in others]
        self._gave_verdict = True
        return squares, finite

    # Workers that leave.

    def leave(self) -> None:
        """A worker has left: nobody may wait for it any longer."""
        self._refuse_hopeless()

    def _refuse_hopeless(self) -> None:
        """Refuse the requests that would wait for a worker that has left."""
        ledger = self._ledger
        if not any(worker.left for worker in ledger.workers):
            return
        reasons: dict[int, str] = {}
        hopeless: list[Waiting] = []
        for index, reads in list(self._reads.queues.items()):
            for waiting in list(reads):
                if reason := self._against_waiting(waiting.worker, waiting.header.clock, index):
                    reads.remove(waiting)
                    hopeless.append(waiting)
                    reasons[id(waiting)] = reason
        ledger.refuse_waiting(hopeless, lambda waiting: reasons[id(waiting)])
        for waiting in list(ledger.ends):
            if reason := self._against_waiting(waiting.worker, waiting.header.clock + 1, None):
                ledger.ends.remove(waiting)
                ledger.refuse(waiting.worker, waiting.header, reason)

    def _against_waiting(self, worker: int, clock: int, index: int | None) -> str:
        """Why a worker waits in vain for ``clock`` rounds of slice ``index`` to end (None: for all workers to end as
        many clocks); empty if it does not."""
        ledger, rounds = self._ledger, self._rounds
        lost = [
            peer
            for peer, state in enumerate(ledger.workers)
            if state.left
            and clock
            > (state.clock if index is None or ledger.rules.agrees else rounds.reach(index, peer, state.clock))
        ]
        if not lost:
            return ""
        who = ", ".join(f"{ledger.names[peer]} (at clock {ledger.workers[peer].clock})" for peer in lost)
        return (
            f"{ledger.names[worker]} waits at clock {ledger.workers[worker].clock} for {who}, which has left; under "
            "bsp all workers make the same number of steps: use ssp or asp where they do not"
        )
