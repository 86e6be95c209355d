"""BSP on a server: rounds become updates, and all servers agree on the norm first where they must.

A slice is updated as soon as its round is complete (:mod:`commlab.ps.server.rounds`). Where the rules demand that
servers agree, all slices of all servers are updated together instead: once all workers have ended the clock, each
server sends the others its verdict, which is the squares of its share of the gradient and whether the share is finite.
A server updates when it has all verdicts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch

from ...native.norm import clip_factor, norm_squared
from ..messages import Header, Kind
from .ledger import Ledger, Waiting
from .reads import Reads
from .rounds import Rounds


class BSP:
    """The synchronization of :class:`commlab.ps.server.server.Server` under BSP. A read waits for the end of a round of
    the slice that is furthest behind, so slices are the events of :class:`Reads`."""

    def __init__(self, ledger: Ledger, reads: Reads):
        self._ledger, self._reads = ledger, reads
        self._rounds = Rounds(ledger.shard, ledger.names)
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
        reason = self._refused[worker] = self._against(worker, header)
        if reason:
            return self._ledger.scratch(worker, header.length)
        if self._rounds.is_ahead(header):
            return None
        span = self._ledger.shard.span(header.key, header.slices)
        assert span is not None and header.dtype is not None
        return self._rounds.slot(worker, header.dtype, *span).view(torch.uint8)

    def take(self, worker: int, header: Header, data: torch.Tensor) -> str:
        """Take in a push, whose numbers are in the slot. Returns why the push is refused; empty if it is not."""
        # What was refused before the numbers came has none in the slot.
        reason = self._refused.pop(worker, "") or self._against(worker, header)
        if not reason:
            self._rounds.take(worker, header, self._ledger.workers[worker].hypers)
            self._add(range(header.key, header.key + header.slices))
        return reason

    def _against(self, worker: int, header: Header) -> str:
        reason = self._ledger.against_push(worker, header)
        return reason or self._rounds.against(worker, header, self._ledger.workers[worker].hypers)

    # Rounds become updates.

    def _add(self, slices: Iterable[int]) -> None:
        complete = self._rounds.add(slices, [worker.clock for worker in self._ledger.workers])
        if self._ledger.rules.agrees:
            self._complete += complete
        elif complete:
            self._end_rounds(complete, 1.0)

    def _end_rounds(self, slices: list[int], clipping: float, *, updates: bool = True) -> None:
        """Update those of ``slices`` that any worker pushed, and answer the reads that wait for them."""
        for clock in sorted({self._rounds.completed[index] for index in slices}):
            ended = [index for index in slices if self._rounds.completed[index] == clock]
            if updates:
                self._update([index for index in ended if self._rounds.added[index]], clock, clipping)
            self._rounds.end(ended)
        for index in slices:
            for waiting in self._reads.take(index):
                self._read(waiting)
        # All workers may have ended the next clock too, without a push.
        self._add(slices)

    def _update(self, slices: list[int], clock: int, clipping: float) -> None:
        """Update ``slices`` with the means of clock ``clock``: all slices that the same workers pushed at once."""
        if not slices:
            return
        hypers = self._rounds.hypers[clock][1]
        factor = clipping / hypers.scale
        for workers in dict.fromkeys(tuple(self._rounds.added[index]) for index in slices):
            together = [index for index in slices if tuple(self._rounds.added[index]) == workers]
            means = {index: self._rounds.mean(index) for index in together}
            self._ledger.shard.update(means, hypers.groups, factor)
            self._ledger.record(together, [(worker, clock, 0) for worker in workers], hypers, factor)

    # Reads.

    def read(self, waiting: Waiting) -> None:
        """Answer a read now, or when the rounds that it waits for have ended; refuse a read that would wait in
        vain."""
        self._read(waiting)
        self._refuse_hopeless()

    def _read(self, waiting: Waiting) -> None:
        header, completed = waiting.header, self._rounds.completed
        furthest_behind = min(range(header.key, header.key + header.slices), key=completed.__getitem__)
        self._reads.read(waiting, completed[furthest_behind], furthest_behind)

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
        squares = norm_squared(rounds.mean(index) for index in self._complete if rounds.added[index])
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
        for index, reads in self._reads.queues.items():
            self._refuse_behind(self._rounds.completed[index], reads)
        self._refuse_behind(self._agreed, self._ledger.ends)

    def _refuse_behind(self, clock: int, requests: list[Waiting] | deque[Waiting]) -> None:
        """Refuse ``requests``, which wait until all workers have ended ``clock``, if any worker will never end it."""
        workers, names = self._ledger.workers, self._ledger.names
        lost = [peer for peer, worker in enumerate(workers) if worker.left and worker.clock <= clock]
        if not lost:
            return
        who = ", ".join(f"{names[peer]} (at clock {workers[peer].clock})" for peer in lost)
        for waiting in requests:
            self._ledger.refuse(
                waiting.worker,
                waiting.header,
                f"{names[waiting.worker]} waits at clock {waiting.header.clock} for {who}, which has left; under bsp "
                "all workers make the same number of steps: use ssp or asp where they do not",
            )
        requests.clear()
