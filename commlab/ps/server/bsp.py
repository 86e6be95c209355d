"""BSP on a server: rounds become updates, all servers agreeing on the norm first where they must."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...native.norm import clip_factor, norm_squared
from ..messages import Header, Kind
from .ledger import Waiting
from .reads import Reads


class Lockstep(Reads):
    """The layer that knows of BSP; see :mod:`commlab.ps.server.ledger`. Elsewhere nothing in it is called."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._complete: list[int] = []
        """Parts whose round is complete, until the verdict."""
        self._decided = 0
        """Clocks on which all servers have agreed."""
        self._gave_verdict = False
        self._finite: dict[int, bool] = {}
        self._verdicts: dict[int, dict[int, tuple[float, bool]]] = {}
        self._clocks: list[Waiting] = []
        """Ends of clocks that wait for the verdict."""

    def _add(self, parts: Iterable[int]) -> None:
        assert self.rounds is not None
        complete = self.rounds.add(parts, [state.clock for state in self.workers])
        if self.rules.agrees:
            self._complete += complete
        elif complete:
            self._end_rounds(complete, 1.0)

    def _end_rounds(self, parts: list[int], factor: float, *, updates: bool = True) -> None:
        """Update those of ``parts`` that anybody pushed, and answer who waits for them."""
        rounds = self.rounds
        assert rounds is not None
        for clock in sorted({rounds.completed[part] for part in parts}):
            now = [part for part in parts if rounds.completed[part] == clock]
            pushed = [part for part in now if rounds.added[part]]
            if pushed and updates:
                hypers = rounds.hypers[clock][1]
                gradients = {part: self._gradient(part, rounds.mean(part), factor / hypers.scale) for part in pushed}
                for workers in dict.fromkeys(tuple(rounds.added[part]) for part in pushed):
                    same = [part for part in pushed if tuple(rounds.added[part]) == workers]
                    self._update(
                        {part: gradients[part] for part in same},
                        [(worker, clock, 0) for worker in workers],
                        hypers,
                        factor / hypers.scale,
                    )
            rounds.end(now)
        for part in parts:
            self._wake(part)
        # All workers may have ended the next clock too, without a push.
        self._add(parts)

    def _agree(self) -> None:
        """Tell the other servers this one's part of the norm, once it is known, and update once all are."""
        clock = self._decided
        if not self.rules.agrees or min(state.clock for state in self.workers) <= clock:
            return
        verdicts = self._verdicts.setdefault(clock, {})
        if not self._gave_verdict:
            assert self.rounds is not None and len(self._complete) == len(self.shard.parts)
            squares = norm_squared(self.rounds.mean(part) for part in self._complete if self.rounds.added[part])
            finite = self._finite.pop(clock) and squares - squares == 0.0
            verdicts[self.index] = squares, finite
            self._gave_verdict = True
            verdict = Header(Kind.VERDICT, clock=clock, value=squares, flag=finite)
            others = [server for server in range(self.rules.servers) if server != self.index]
            self.outbox += [(self.rules.workers + server, verdict, None) for server in others]
        if len(verdicts) < self.rules.servers:
            return
        squares = sum(verdicts[server][0] for server in range(self.rules.servers))
        finite = all(good for _, good in verdicts.values())
        del self._verdicts[clock]
        self._decided, self._gave_verdict = clock + 1, False
        assert self.rounds is not None
        scale = self.rounds.hypers[clock][1].scale if clock in self.rounds.hypers else 1.0
        complete, self._complete = self._complete, []
        # The answers first: who asks for the norm need not wait for the update.
        for waiting in [waiting for waiting in self._clocks if waiting.header.clock == clock]:
            self._clocks.remove(waiting)
            self._answer(waiting.worker, waiting.header, value=squares, flag=finite)
        factor = clip_factor(squares**0.5 / scale, self.rules.max_grad_norm)
        self._end_rounds(complete, factor, updates=finite or not self.rules.skips)
        self._agree()

    def _refuse_hopeless(self) -> None:
        """BSP: answer those who would wait for a worker that has left."""
        gone = [peer for peer, state in enumerate(self.workers) if state.left]
        if not gone:
            return
        for part, reads in list(self._reads.items()):
            assert self.rounds is not None
            lost = [peer for peer in gone if self.workers[peer].clock <= self.rounds.completed[part]]
            for waiting in list(reads) if lost else ():
                reads.remove(waiting)
                self._refuse_waiting(waiting, lost)
        lost = [peer for peer in gone if self.workers[peer].clock <= self._decided]
        for waiting in list(self._clocks) if lost else ():
            self._clocks.remove(waiting)
            self._refuse_waiting(waiting, lost)

    def _refuse_waiting(self, waiting: Waiting, lost: list[int]) -> None:
        who = ", ".join(f"{self.names[peer]} (at clock {self.workers[peer].clock})" for peer in lost)
        self._answer_text(
            waiting.worker,
            waiting.header,
            Kind.ERROR,
            f"{self.names[waiting.worker]} waits at clock {waiting.header.clock} for {who}, which has left; under bsp "
            "all workers make the same number of steps: use ssp or asp where they do not",
        )
