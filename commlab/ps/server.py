"""One server as a state machine: a message in, messages out. It neither waits nor knows of a transport.

    place(peer, header)            where the numbers of a message are to be written, before they have arrived
    receive(peer, header, data)    take the message in; answers go to ``outbox``

So the order in which messages come in is all there is to it: tests deliver them in any order, and the same order gives
the same bits.

BSP: rounds (:mod:`commlab.ps.rounds`); a part is updated as soon as its round is complete, or, where ``agrees``, all
parts of all servers together, once all workers have ended the clock and the servers have told each other their part of
the gradient's norm. SSP and ASP: every push is an update of its own, made when it arrives.
M. Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..errors import CommlabError
from ..gradients.norm import clip_factor, norm_squared
from .consistency import Consistency, lacking
from .messages import Header, Kind
from .rounds import Hypers, Rounds
from .shard import Shard


class Rules(NamedTuple):
    """What holds for all servers and workers of a store. ``agrees`` (BSP only): updates of a clock are made together,
    after the servers have agreed on the norm. ``skips``: and not at all where any number is not finite."""

    consistency: Consistency
    workers: int
    servers: int = 1
    agrees: bool = False
    skips: bool = False
    max_grad_norm: float | None = None


class Waiting(NamedTuple):
    """A request that can't be answered yet; ``since_s`` by the clock that :attr:`Server.now_s` is set from."""

    worker: int
    header: Header
    since_s: float


@dataclass
class Worker:
    """What the server knows of one."""

    clock: int = 0
    """Clocks that it has ended."""
    left: bool = False
    closed: bool = False
    hypers: Hypers = field(default_factory=Hypers)
    staleness: Counter[int] = field(default_factory=Counter)
    """Of its reads: how many lacked how many clocks."""
    refused: str = ""
    """Why the message that is on its way from it will be."""


class Record(NamedTuple):
    """An update as it was made: of these parts, from these pushes, ``(worker, clock, sequence)`` each (BSP: the workers
    in the order in which they were added, sequence 0), with all gradients multiplied by ``factor``."""

    parts: tuple[int, ...]
    pushes: tuple[tuple[int, int, int], ...]
    hypers: Hypers
    factor: float


class Server:
    """Server ``index`` of a store. Peers 0 .. W - 1 are the workers in rank order, W .. W + K - 1 the servers.

    ``names`` says in messages who the workers are. ``log``: where given, every update is appended to it.
    """

    def __init__(
        self,
        shard: Shard,
        rules: Rules,
        index: int = 0,
        names: Iterable[str] | None = None,
        log: list[Record] | None = None,
    ):
        self.shard, self.rules, self.index, self.log = shard, rules, index, log
        self.names = list(names or (f"worker {worker}" for worker in range(rules.workers)))
        self.workers = [Worker() for _ in range(rules.workers)]
        self.outbox: list[tuple[int, Header, torch.Tensor | None]] = []
        """(to, header, bytes that follow) in the order in which they were decided; whoever drives takes them out."""
        self.now_s = 0.0
        parts = len(shard.parts)
        self.versions = [0] * parts
        """Updates of every part; its first value is the first one."""
        self.rounds = Rounds(shard, self.names) if rules.consistency.averages else None
        self._complete: list[int] = []
        """Parts whose round is complete, until the verdict."""
        self._decided = 0
        """Clocks on which all servers have agreed."""
        self._gave_verdict = False
        self._finite: dict[int, bool] = {}
        self._verdicts: dict[int, dict[int, tuple[float, bool]]] = {}
        self._clocks: list[Waiting] = []
        """Ends of clocks that wait for the verdict."""
        self._reads: dict[int, deque[Waiting]] = {}
        """Reads that wait, by the part whose round they wait for; under SSP all at -1."""
        self._encoded: dict[tuple[int, int, int], tuple[int, torch.Tensor]] = {}
        self._scratch: dict[int, torch.Tensor] = {}
        self._tickets = 0

    @property
    def closed(self) -> bool:
        """Whether all workers have said their last word."""
        return all(state.closed for state in self.workers)

    # Messages in.

    def place(self, peer: int, header: Header) -> torch.Tensor | None:
        """Memory (bytes) for what follows ``header``, or None while it can't be taken in: ask again after the next
        :meth:`receive`."""
        if self.rounds is not None and header.kind == Kind.PUSH:
            state = self.workers[peer]
            state.refused = self._against_push(peer, header)
            if not state.refused:
                if self.rounds.is_ahead(header):
                    return None
                run = self.shard.run(header.key, header.parts)
                assert run is not None and header.dtype is not None
                return self.rounds.slot(peer, header.dtype, *run).view(torch.uint8)
        if header.length > self._scratch.get(peer, torch.empty(0)).numel():
            self._scratch[peer] = torch.empty(header.length, dtype=torch.uint8)
        return self._scratch[peer][: header.length] if header.length else torch.empty(0, dtype=torch.uint8)

    def receive(self, peer: int, header: Header, data: torch.Tensor) -> None:
        """Take in a message whose bytes lie in ``data``, where :meth:`place` put them."""
        if header.kind == Kind.VERDICT:
            self._verdicts.setdefault(header.clock, {})[peer - self.rules.workers] = (header.value, header.flag)
            self._agree()
            return
        state = self.workers[peer]
        if header.kind in (Kind.PUSH, Kind.INIT):
            self._take_numbers(peer, header, data)
        elif header.kind == Kind.PULL:
            self._pull(peer, header)
        elif header.kind == Kind.CLOCK:
            self._end_clock(peer, header)
        elif header.kind == Kind.HYPER:
            state.hypers = _hypers(data)
            self._answer(peer, header)
        elif header.kind == Kind.TICKET:
            self._answer(peer, header._replace(clock=self._tickets))
            self._tickets += 1
        elif header.kind == Kind.REPORT:
            self._answer_text(peer, header, Kind.TEXT, json.dumps(self.report()))
        elif header.kind in (Kind.LEAVE, Kind.CLOSE):
            self._leave(peer)
            state.closed = header.kind == Kind.CLOSE
            self._answer(peer, header)
        else:
            self._answer_text(peer, header, Kind.ERROR, f"{header.kind.name} is not a request")

    # Pushes.

    def _take_numbers(self, peer: int, header: Header, data: torch.Tensor) -> None:
        state = self.workers[peer]
        refused, state.refused = state.refused, ""
        refused = refused or (self._against_push(peer, header) if header.kind == Kind.PUSH else self._against(header))
        if refused:
            self._answer_text(peer, header, Kind.ERROR, refused)
            return
        assert header.dtype is not None
        run = range(header.key, header.key + header.parts)
        if header.kind == Kind.INIT:
            found = self.shard.run(header.key, header.parts)
            assert found is not None
            dtype, place = found
            self.shard.values[dtype][place.start : place.stop].copy_(data.view(header.dtype))
            for part in run:
                self.versions[part] += 1
        elif self.rounds is not None:
            self.rounds.take(peer, header, state.hypers)
            self._add(run)
        else:
            self._update_at_once(peer, header, data.view(header.dtype))
        self._answer(peer, header)

    def _against(self, header: Header, *, sized: bool = True) -> str:
        """Why a message about these parts can't be what it says; empty if it can."""
        run = self.shard.run(header.key, header.parts)
        if run is None:
            return (
                f"parts {header.key}..{header.key + header.parts - 1} do not lie side by side on server {self.index}, "
                f"which has {len(self.shard.parts)}"
            )
        dtype, place = run
        what = repr(self.shard.names[header.key])
        if header.dtype is None or (header.dtype != dtype and header.dtype.itemsize != 2):
            wire = str(header.dtype or f"code {header.wire}").removeprefix("torch.")
            return f"{what} is {str(dtype).removeprefix('torch.')} and can't travel as {wire}"
        if sized and header.length != place.numel * header.dtype.itemsize:
            return f"{what} takes {place.numel * header.dtype.itemsize} B, and {header.length} B came"
        return ""

    def _against_push(self, peer: int, header: Header) -> str:
        refused = self._against(header)
        if refused:
            return refused
        what, state = repr(self.shard.names[header.key]), self.workers[peer]
        if not all(self.versions[header.key : header.key + header.parts]):
            return f"{what} was pushed by {self.names[peer]} before it had a first value"
        if state.left:
            return f"{what} was pushed by {self.names[peer]}, which has left"
        if header.clock != state.clock:
            return f"{what} was pushed by {self.names[peer]} for clock {header.clock}, and it is at clock {state.clock}"
        return "" if self.rounds is None else self.rounds.against(peer, header, state.hypers)

    def _update_at_once(self, peer: int, header: Header, numbers: torch.Tensor) -> None:
        hypers = self.workers[peer].hypers
        gradients, at = {}, 0
        for part in range(header.key, header.key + header.parts):
            numel = self.shard.parts[part].numel
            gradients[part] = self._gradient(part, numbers[at : at + numel], 1 / hypers.scale)
            at += numel
        self._update(gradients, ((peer, header.clock, header.sequence),), hypers, 1 / hypers.scale)

    def _gradient(self, part: int, numbers: torch.Tensor, factor: float) -> torch.Tensor:
        """``numbers`` times ``factor`` in the part's dtype; 16-bit ones multiplied in fp32, so rounded once."""
        dtype = self.shard.dtypes[part]
        if factor != 1.0:
            numbers = (numbers.float() if numbers.element_size() == 2 else numbers) * factor
        return numbers.to(dtype)

    def _update(
        self, gradients: dict[int, torch.Tensor], pushes: Iterable[tuple[int, int, int]], hypers: Hypers, factor: float
    ) -> None:
        self.shard.update(gradients, hypers.groups)
        for part in gradients:
            self.versions[part] += 1
        if self.log is not None:
            self.log.append(Record(tuple(gradients), tuple(pushes), hypers, factor))

    # Clocks.

    def _end_clock(self, peer: int, header: Header) -> None:
        state = self.workers[peer]
        if state.left or header.clock != state.clock:
            why = "has left" if state.left else f"is at clock {state.clock}"
            self._answer_text(peer, header, Kind.ERROR, f"{self.names[peer]} can't end clock {header.clock}: it {why}")
            return
        state.clock += 1
        if self.rules.agrees:
            self._finite[header.clock] = self._finite.get(header.clock, True) and header.flag
            self._clocks.append(Waiting(peer, header, self.now_s))
        else:
            self._answer(peer, header)
        if self.rounds is not None:
            self._add(range(len(self.shard.parts)))
            self._agree()
            self._refuse_hopeless()
        else:
            self._wake(-1)

    def _leave(self, peer: int) -> None:
        self.workers[peer].left = True
        if self.rounds is None:
            self._wake(-1)
        else:
            self._refuse_hopeless()

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

    # BSP.

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

    # Reads.

    def _contained(self, header: Header) -> int:
        """Clocks that the parts of a read have of every worker that is still there."""
        if self.rounds is not None:
            return min(self.rounds.completed[header.key : header.key + header.parts])
        return min((state.clock for state in self.workers if not state.left), default=header.clock)

    def _pull(self, peer: int, header: Header) -> None:
        refused = self._against(header, sized=False)
        if not refused and not all(self.versions[header.key : header.key + header.parts]):
            refused = f"{self.shard.names[header.key]!r} was pulled by {self.names[peer]} before it had a first value"
        if refused:
            self._answer_text(peer, header, Kind.ERROR, refused)
            return
        self._read(Waiting(peer, header, self.now_s))
        if self.rounds is not None:
            self._refuse_hopeless()

    def _read(self, waiting: Waiting) -> None:
        header = waiting.header
        if not self.rules.consistency.may_read(header.clock, self._contained(header)):
            at = -1
            if self.rounds is not None:
                run = range(header.key, header.key + header.parts)
                at = min(run, key=self.rounds.completed.__getitem__)
            self._reads.setdefault(at, deque()).append(waiting)
            return
        stale = lacking(header.clock, self._contained(header))
        if not self.rules.consistency.keeps(stale):
            raise CommlabError(
                f"server {self.index} answered a read of {self.shard.names[header.key]!r} at clock {header.clock} that "
                f"lacks {stale} clocks, which {self.rules.consistency.name} does not allow: a fault of commlab"
            )
        self.workers[waiting.worker].staleness[stale] += 1
        numbers = self._encode(header)
        version = min(self.versions[header.key : header.key + header.parts])
        answer = header._replace(kind=Kind.VALUES, length=numbers.numel(), value=float(stale), clock=version)
        self.outbox.append((waiting.worker, answer, numbers))

    def _encode(self, header: Header) -> torch.Tensor:
        """The parts' values as they travel: a copy, because they may be updated while it is on its way; one for all who
        read the same versions."""
        key, versions = (
            (header.key, header.parts, header.wire),
            sum(self.versions[header.key : header.key + header.parts]),
        )
        found = self._encoded.get(key)
        if found is None or found[0] != versions:
            run = self.shard.run(header.key, header.parts)
            assert run is not None and header.dtype is not None
            dtype, place = run
            numbers = self.shard.values[dtype][place.start : place.stop].to(header.dtype, copy=True)
            found = self._encoded[key] = versions, numbers.view(torch.uint8)
        return found[1]

    def _wake(self, part: int) -> None:
        for waiting in self._reads.pop(part, ()):
            self._read(waiting)

    # Answers and reports.

    def _answer(self, peer: int, header: Header, value: float = 0.0, flag: bool = True) -> None:
        self.outbox.append((peer, header._replace(kind=Kind.ACK, length=0, value=value, flag=flag), None))

    def _answer_text(self, peer: int, header: Header, kind: Kind, text: str) -> None:
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        self.outbox.append((peer, header._replace(kind=kind, length=data.numel()), data))

    def report(self) -> dict[str, object]:
        """What JSON can hold: this server's reads by staleness, updates, and the clocks of its workers."""
        reads = sum((state.staleness for state in self.workers), Counter())
        return {
            "staleness": {str(stale): count for stale, count in sorted(reads.items())},
            "updates": sum(self.versions),
            "clocks": [state.clock for state in self.workers],
        }

    def overdue(self, limit_s: float) -> list[tuple[Waiting, str]]:
        """Requests that have waited for ``limit_s``, and for whom."""
        found = []
        for waiting in (*self._clocks, *(waiting for reads in self._reads.values() for waiting in reads)):
            if self.now_s - waiting.since_s >= limit_s:
                slowest = min(state.clock for state in self.workers if not state.left)
                slow = [peer for peer, state in enumerate(self.workers) if state.clock == slowest and not state.left]
                who = ", ".join(self.names[peer] for peer in slow)
                found.append((waiting, f"{who} (at clock {slowest})"))
        return found

    def give_up(self, limit_s: float) -> None:
        """Answer what has waited for ``limit_s`` with an error that names the slow."""
        for waiting, who in self.overdue(limit_s):
            for reads in (self._clocks, *self._reads.values()):
                if waiting in reads:
                    reads.remove(waiting)
            text = (
                f"{self.names[waiting.worker]} has waited {self.now_s - waiting.since_s:.1f} s at clock "
                f"{waiting.header.clock} for {who}; it may be stuck or slow: see its own output, or raise the timeout"
            )
            self._answer_text(waiting.worker, waiting.header, Kind.ERROR, text)


def _hypers(data: torch.Tensor) -> Hypers:
    said = json.loads(bytes(data.numpy()))
    groups = said["groups"]
    if groups is not None:
        groups = [{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()} for entry in groups]
    return Hypers(groups, said["scale"])
