"""One server as a state machine: a message in, messages out. The server neither waits nor knows of a transport.

    memory_for(peer, header)       where the numbers of a message are to be written, before they have arrived
    receive(peer, header, data)    take the message in; answers go to ``ledger.outbox``

The order in which messages come in decides everything: tests deliver messages in any order, and one order always gives
the same bits.

What a push does to the values, and when they may be read, is the synchronization's affair: :class:`BSP` or
:class:`Immediate`, which both do what :class:`Synchronization` asks. All else is the same under every consistency.
M. Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable

import torch

from ...errors import UsageError
from .. import hypers
from ..encoding import decode, encode
from ..messages import Header, Kind
from .bsp import BSP
from .framed import FrameIntake
from .immediate import Immediate
from .ledger import Ledger, Overdue, Record, Rules, Waiting
from .reads import Reads
from .shard import Shard
from .synchronization import Synchronization


class Server:
    """Server ``index`` of a store. Peers 0 .. W - 1 are the workers in rank order, W .. W + K - 1 the servers.
    ``names`` and ``log`` are those of :class:`Ledger`."""

    def __init__(
        self,
        shard: Shard,
        rules: Rules,
        index: int = 0,
        names: Iterable[str] | None = None,
        log: list[Record] | None = None,
    ):
        self.ledger = Ledger(shard, rules, index, names, log)
        self.reads = Reads(self.ledger)
        side = BSP if rules.consistency.averages else Immediate
        self._synchronization: Synchronization = side(self.ledger, self.reads)
        self._framed = FrameIntake(self.ledger, self._synchronization)
        self._tickets = 0
        """How many tickets were given out."""

    # Messages in.

    def memory_for(self, peer: int, header: Header) -> torch.Tensor | None:
        """Memory (bytes) for what follows ``header``, or None while the message can't be taken in: ask again after the
        next :meth:`receive`."""
        if header.kind == Kind.PUSH:
            return self._synchronization.memory_for(peer, header)
        return self.ledger.scratch(peer, header.length)

    def ready(self, peer: int, header: Header, data: torch.Tensor) -> bool:
        """Whether a message that has arrived can be taken in: else ask again after the next :meth:`receive`."""
        return header.kind not in (Kind.PUSH_FRAME, Kind.PULL_FRAME) or self._framed.ready(peer, header, data)

    def receive(self, peer: int, header: Header, data: torch.Tensor) -> None:
        """Take in a message that is :meth:`ready`, and whose bytes lie in ``data``, where :meth:`memory_for` wanted
        them."""
        ledger, kind = self.ledger, header.kind
        if kind == Kind.VERDICT and peer >= ledger.rules.workers:
            self._synchronization.take_verdict(peer - ledger.rules.workers, header)
        elif kind == Kind.PUSH:
            self._answer(peer, header, self._synchronization.take(peer, header, data))
        elif kind == Kind.PULL:
            self._pull(peer, header)
        elif kind in (Kind.PUSH_FRAME, Kind.PULL_FRAME):
            self._framed.take(peer, header)
        elif kind == Kind.INIT:
            self._answer(peer, header, self._assign(header, data))
        elif kind == Kind.CLOCK:
            self._end_clock(peer, header)
        elif kind == Kind.HYPER:
            ledger.workers[peer].hypers = hypers.decode(bytes(data.numpy()))
            ledger.acknowledge(peer, header)
        elif kind == Kind.TICKET:
            ledger.acknowledge(peer, header._replace(clock=self._tickets))
            self._tickets += 1
        elif kind == Kind.REPORT:
            ledger.answer_text(peer, header, Kind.TEXT, json.dumps(ledger.report()))
        elif kind in (Kind.GET_STATE, Kind.SET_STATE):
            self._move_state(peer, header, data)
        elif kind in (Kind.LEAVE, Kind.CLOSE):
            ledger.workers[peer].left = True
            self._synchronization.leave()
            ledger.workers[peer].closed = kind == Kind.CLOSE
            ledger.acknowledge(peer, header)
        else:
            ledger.refuse(peer, header, f"{kind.name} is not a request")
        if self.reads.allowed:
            self.reads.answer()

    def _answer(self, peer: int, header: Header, refusal: str) -> None:
        if refusal:
            self.ledger.refuse(peer, header, refusal)
        else:
            self.ledger.acknowledge(peer, header)

    # Values.

    def _assign(self, header: Header, data: torch.Tensor) -> str:
        reason = self.ledger.against(header)
        if not reason:
            assert header.dtype is not None
            self.ledger.shard.assign(header.key, header.slices, data.view(header.dtype))
        return reason

    def _pull(self, peer: int, header: Header) -> None:
        reason = self.ledger.against_pull(peer, header)
        if reason:
            self.ledger.refuse(peer, header, reason)
        else:
            self._synchronization.read(peer, header, [(header.key, header.slices)])

    def _end_clock(self, peer: int, header: Header) -> None:
        worker = self.ledger.workers[peer]
        if worker.left or header.clock != worker.clock:
            why = "has left" if worker.left else f"is at clock {worker.clock}"
            self.ledger.refuse(peer, header, f"{self.ledger.names[peer]} can't end clock {header.clock}: it {why}")
            return
        worker.clock += 1
        self._synchronization.end_clock(peer, header)

    # The optimizer's state.

    def _move_state(self, peer: int, header: Header, data: torch.Tensor) -> None:
        ledger = self.ledger
        reason = "" if header.key < len(ledger.shard.slices) else ledger.against(header)
        if not reason:
            try:
                if header.kind == Kind.GET_STATE:
                    ledger.answer(peer, header, Kind.STATE, encode(ledger.shard.state(header.key)))
                else:
                    ledger.shard.set_state(header.key, decode(data))
                    ledger.acknowledge(peer, header)
                return
            except UsageError as error:
                reason = str(error)
        ledger.refuse(peer, header, reason)

    # Requests that have waited too long.

    def overdue(self, limit_s: float) -> list[tuple[Waiting, str]]:
        """Requests that have waited for ``limit_s``, and the workers that each waits for."""
        ledger = self.ledger
        reads = (waiting for queue in self.reads.queues.values() for waiting in queue)
        waits = [
            waiting
            for waiting in (*ledger.held.values(), *ledger.ends, *reads)
            if ledger.now_s - waiting.since_s >= limit_s
        ]
        slowest = min((worker.clock for worker in ledger.workers if not worker.left), default=0)
        slow = [
            name
            for name, worker in zip(ledger.names, ledger.workers, strict=True)
            if worker.clock == slowest and not worker.left
        ]
        return [(waiting, f"{', '.join(slow)} (at clock {slowest})") for waiting in waits]

    def give_up(self, limit_s: float) -> None:
        """Refuse the requests that have waited for ``limit_s``, naming the slow workers."""
        ledger = self.ledger
        overdue = self.overdue(limit_s)
        if not overdue:
            return
        who = overdue[0][1]

        def reason(waiting: Waiting) -> Overdue:
            return Overdue(
                f"{ledger.names[waiting.worker]} has waited {ledger.now_s - waiting.since_s:.1f} s at clock "
                f"{waiting.header.clock} for {who}; it may be stuck or slow: see its own output, or raise the timeout"
            )

        given_up = {id(waiting) for waiting, _ in overdue}
        for waiting, _ in overdue:
            if ledger.held.get(waiting.worker) is waiting:
                # Its numbers are still to come: it is refused as soon as the link looks again.
                ledger.given_up[waiting.worker] = reason(waiting)
        for index, queue in list(self.reads.queues.items()):
            self.reads.queues[index] = deque(waiting for waiting in queue if id(waiting) not in given_up)
        held = {id(waiting) for waiting in ledger.held.values()}
        ledger.ends = [waiting for waiting in ledger.ends if id(waiting) not in given_up]
        ledger.refuse_waiting((waiting for waiting, _ in overdue if id(waiting) not in held), reason)
