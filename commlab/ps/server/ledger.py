"""What a server knows: its shard, the rules, its workers, the answers on their way out, and what it refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .. import frames
from ..consistency import Consistency
from ..frames import Entry
from ..hypers import Hypers
from ..messages import NO_WIRE, Header, Kind
from .shard import Shard


class Rules(NamedTuple):
    """What holds for all servers and workers of a store. ``agrees`` (BSP only): the updates of a clock are made
    together, after the servers have agreed on the norm. ``skips``: no update is made in a clock in which any number is
    not finite."""

    consistency: Consistency
    workers: int
    servers: int = 1
    agrees: bool = False
    skips: bool = False
    max_grad_norm: float | None = None


class Overdue(str):
    """Why a request was given up that could have been: a worker was waited for too long."""


class Waiting(NamedTuple):
    """A request, or the entry ``(first, slices)`` of a frame, that can't be answered yet. ``since_s``: when the request
    came, by :attr:`Ledger.now_s`."""

    worker: int
    header: Header
    since_s: float
    first: int = 0
    slices: int = 0


@dataclass
class Worker:
    """What the server knows of one worker."""

    clock: int = 0
    """How many clocks the worker has ended."""
    left: bool = False
    """Whether the worker pushes no more."""
    closed: bool = False
    """Whether the worker sends nothing more."""
    hypers: Hypers = field(default_factory=Hypers)
    """What the worker's next pushes are to be updated with."""
    staleness: Counter[int] = field(default_factory=Counter)
    """How many of the worker's reads lacked 0, 1, ... clocks of the slowest worker."""


class Record(NamedTuple):
    """An update as it was made: of these slices, from these pushes, ``(worker, clock, sequence)`` each (BSP: the
    workers in the order in which they were added, sequence 0), with all gradients multiplied by ``factor``."""

    slices: tuple[int, ...]
    pushes: tuple[tuple[int, int, int], ...]
    hypers: Hypers
    factor: float


class Ledger:
    """What server ``index`` of a store knows. ``names``: what messages call the workers. ``log``: where given, a record
    of every update is appended to the list."""

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
        """Messages to send, as (peer, header, bytes that follow), in the order in which they were decided on; whoever
        drives the server takes them out."""
        self.ends: list[Waiting] = []
        """Ends of clocks, which are answered when all servers have agreed on the norm."""
        self.held: dict[int, Waiting] = {}
        """By worker: the push that can't be taken in before others have ended a clock."""
        self.given_up: dict[int, Overdue] = {}
        """By worker: why the push that is held will be refused."""
        self.now_s = 0.0
        """The time, which whoever drives the server sets."""
        self._scratch: dict[int, torch.Tensor] = {}

    @property
    def closed(self) -> bool:
        """Whether no worker will send anything more."""
        return all(worker.closed for worker in self.workers)

    def scratch(self, peer: int, length: int) -> torch.Tensor:
        """Memory (bytes) for a message of ``peer`` whose bytes are used before the peer's next message comes."""
        if peer not in self._scratch or length > self._scratch[peer].numel():
            self._scratch[peer] = torch.empty(length, dtype=torch.uint8, device="cpu")
        return self._scratch[peer][:length]

    # Answers.

    def acknowledge(self, peer: int, header: Header, value: float = 0.0, flag: bool = True) -> None:
        """Answer the request ``header``: it was carried out."""
        self.outbox.append((peer, header._replace(kind=Kind.ACK, length=0, value=value, flag=flag), None))

    def answer(self, peer: int, header: Header, kind: Kind, data: torch.Tensor) -> None:
        """Answer the request ``header`` with ``data`` (bytes)."""
        self.outbox.append((peer, header._replace(kind=kind, length=data.numel()), data))

    def answer_text(self, peer: int, header: Header, kind: Kind, text: str) -> None:
        """Answer the request ``header`` with ``text``."""
        self.answer(peer, header, kind, torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))

    def refuse(self, peer: int, header: Header, reason: str) -> None:
        """Answer the request ``header`` with an error."""
        self.answer_text(peer, header._replace(flag=not isinstance(reason, Overdue)), Kind.ERROR, reason)

    def refuse_entries(self, peer: int, header: Header, entries: Sequence[Entry], reason: str) -> None:
        """Answer these entries of the frame ``header`` with an error."""
        header = header._replace(key=len(entries), flag=not isinstance(reason, Overdue))
        text = torch.frombuffer(bytearray(reason.encode()), dtype=torch.uint8)
        self.answer(peer, header, Kind.REFUSED_FRAME, frames.pack(entries, text))

    def refuse_waiting(self, requests: Iterable[Waiting], reason: Callable[[Waiting], str]) -> None:
        """Answer requests that have waited with an error each; those of one frame in one message."""
        framed: dict[tuple[int, int], list[Waiting]] = {}
        for waiting in requests:
            if waiting.header.kind == Kind.PULL_FRAME:
                framed.setdefault((waiting.worker, waiting.header.sequence), []).append(waiting)
            else:
                self.refuse(waiting.worker, waiting.header, reason(waiting))
        for together in framed.values():
            entries = [(waiting.first, waiting.slices) for waiting in together]
            self.refuse_entries(together[0].worker, together[0].header, entries, reason(together[0]))

    # Refusals: each method returns the reason, or nothing where there is none.

    def against(self, header: Header, *, sized: bool = True) -> str:
        """Why there can be no message about these slices in this dtype, or, where ``sized``, of this length."""
        span = self.shard.span(header.key, header.slices)
        if span is None:
            return (
                f"parts {header.key}..{header.key + header.slices - 1} do not lie side by side on server "
                f"{self.index}, which has {len(self.shard.slices)}"
            )
        dtype, where = span
        what = repr(self.shard.names[header.key])
        if header.wire == NO_WIRE and header.kind == Kind.PUSH and not sized:
            return ""
        if header.dtype is None or (header.dtype != dtype and header.dtype.itemsize != 2):
            wire = str(header.dtype or f"code {header.wire}").removeprefix("torch.")
            return f"{what} is {str(dtype).removeprefix('torch.')} and can't travel as {wire}"
        if sized and header.length != where.numel * header.dtype.itemsize:
            return f"{what} takes {where.numel * header.dtype.itemsize} B, and {header.length} B came"
        return ""

    def against_push(self, worker: int, header: Header, *, sized: bool = True) -> str:
        """Why this push of a worker can't be taken in, whatever the consistency."""
        reason = self.against(header, sized=sized)
        if reason:
            return reason
        what = f"{self.shard.names[header.key]!r} was pushed by {self.names[worker]}"
        state = self.workers[worker]
        if not self.shard.has_values(header.key, header.slices):
            return f"{what} before it had a first value"
        if state.left:
            return f"{what}, which has left"
        if header.clock != state.clock:
            return f"{what} for clock {header.clock}, and it is at clock {state.clock}"
        return ""

    def against_pull(self, worker: int, header: Header) -> str:
        """Why this pull of a worker can never be answered."""
        reason = self.against(header, sized=False)
        if not reason and not self.shard.has_values(header.key, header.slices):
            reason = f"{self.shard.names[header.key]!r} was pulled by {self.names[worker]} before it had a first value"
        return reason

    # Updates and reports.

    def record(
        self, slices: Iterable[int], pushes: Iterable[tuple[int, int, int]], hypers: Hypers, factor: float
    ) -> None:
        """Note an update that was made, where anybody wants to know."""
        if self.log is not None:
            self.log.append(Record(tuple(slices), tuple(pushes), hypers, factor))

    def report(self) -> dict[str, object]:
        """This server's reads by staleness, its updates, and the clocks of its workers, as JSON has them."""
        reads = sum((worker.staleness for worker in self.workers), Counter())
        return {
            "staleness": {str(stale): count for stale, count in sorted(reads.items())},
            "updates": sum(self.shard.versions),
            "clocks": [worker.clock for worker in self.workers],
        }
