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
from collections.abc import Iterable
from typing import Protocol

import torch

from ...errors import UsageError
from ..encoding import decode, encode
from ..messages import Header, Kind
from .bsp import BSP
from .immediate import Immediate
from .ledger import Hypers, Ledger, Record, Rules, Waiting
from .reads import Reads
from .shard import Shard


class Synchronization(Protocol):
    """How the workers' pushes become updates, and who waits for whom. The ledger already has the new clock when
    :meth:`end_clock` is called, and knows who has left when :meth:`leave` is called."""

    def memory_for(self, worker: int, header: Header) -> torch.Tensor | None:
        """Memory (bytes) for the numbers of a push, or None while the push can't be taken in."""

    def take(self, worker: int, header: Header, data: torch.Tensor) -> str:
        """Take in a push. Returns why the push is refused; empty if it is not."""

    def read(self, waiting: Waiting) -> None:
        """Answer a read as soon as the consistency allows."""

    def end_clock(self, worker: int, header: Header) -> None:
        """Answer a worker that has ended its clock, and go on with what waited for the clock's end."""

    def leave(self) -> None:
        """Go on with, or refuse, what waited for a worker that has left."""

    def take_verdict(self, server: int, header: Header) -> None:
        """Take in what another server has found out about its share of a clock's gradient."""


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
        self._tickets = 0
        """How many tickets were given out."""

    # Messages in.

    def memory_for(self, peer: int, header: Header) -> torch.Tensor | None:
        """Memory (bytes) for what follows ``header``, or None while the message can't be taken in: ask again after the
        next :meth:`receive`."""
        if header.kind == Kind.PUSH:
            return self._synchronization.memory_for(peer, header)
        return self.ledger.scratch(peer, header.length)

    def receive(self, peer: int, header: Header, data: torch.Tensor) -> None:
        """Take in a message whose bytes lie in ``data``, where :meth:`memory_for` wanted them."""
        ledger, kind = self.ledger, header.kind
        if kind == Kind.VERDICT and peer >= ledger.rules.workers:
            self._synchronization.take_verdict(peer - ledger.rules.workers, header)
        elif kind == Kind.PUSH:
            self._answer(peer, header, self._synchronization.take(peer, header, data))
        elif kind == Kind.PULL:
            self._pull(peer, header)
        elif kind == Kind.INIT:
            self._answer(peer, header, self._assign(header, data))
        elif kind == Kind.CLOCK:
            self._end_clock(peer, header)
        elif kind == Kind.HYPER:
            ledger.workers[peer].hypers = _hypers(data)
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
            self._synchronization.read(Waiting(peer, header, self.ledger.now_s))

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
        found, ledger = [], self.ledger
        for waiting in (*ledger.ends, *(waiting for reads in self.reads.queues.values() for waiting in reads)):
            if ledger.now_s - waiting.since_s >= limit_s:
                slowest = min(worker.clock for worker in ledger.workers if not worker.left)
                slow = [
                    name
                    for name, worker in zip(ledger.names, ledger.workers, strict=True)
                    if worker.clock == slowest and not worker.left
                ]
                found.append((waiting, f"{', '.join(slow)} (at clock {slowest})"))
        return found

    def give_up(self, limit_s: float) -> None:
        """Refuse the requests that have waited for ``limit_s``, naming the slow workers."""
        ledger = self.ledger
        for waiting, who in self.overdue(limit_s):
            for requests in (ledger.ends, *self.reads.queues.values()):
                if waiting in requests:
                    requests.remove(waiting)
            text = (
                f"{ledger.names[waiting.worker]} has waited {ledger.now_s - waiting.since_s:.1f} s at clock "
                f"{waiting.header.clock} for {who}; it may be stuck or slow: see its own output, or raise the timeout"
            )
            ledger.refuse(waiting.worker, waiting.header, text)


def _hypers(data: torch.Tensor) -> Hypers:
    """The hyper-parameters that a worker has sent. JSON has made lists of tuples."""
    sent = json.loads(bytes(data.numpy()))
    groups = sent["groups"]
    if groups is not None:
        groups = [{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()} for entry in groups]
    return Hypers(groups, sent["scale"])
