"""What a server knows, what it answers, and what it refuses: the lowest layer of its state machine.

    State       shard, workers, versions, outbox     this file
    Reads       who may read now, and who waits      commlab.ps.server.reads
    Lockstep    BSP's rounds, the agreed norm        commlab.ps.server.bsp
    Server      messages in                          commlab.ps.server.server

Every layer calls those above it in this list, and none below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..consistency import Consistency
from ..messages import Header, Kind
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


class State:
    """See :class:`commlab.ps.server.server.Server`."""

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
        self._scratch: dict[int, torch.Tensor] = {}
        """Memory for what a peer sends, where it has no place of its own."""
        self._tickets = 0
        """Shares of the work that were given out."""

    @property
    def closed(self) -> bool:
        """Whether all workers have said their last word."""
        return all(state.closed for state in self.workers)

    # Answers.

    def _answer(self, peer: int, header: Header, value: float = 0.0, flag: bool = True) -> None:
        self.outbox.append((peer, header._replace(kind=Kind.ACK, length=0, value=value, flag=flag), None))

    def _answer_text(self, peer: int, header: Header, kind: Kind, text: str) -> None:
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        self.outbox.append((peer, header._replace(kind=kind, length=data.numel()), data))

    # What is refused.

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

    # Updates.

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

    def report(self) -> dict[str, object]:
        """What JSON can hold: this server's reads by staleness, updates, and the clocks of its workers."""
        reads = sum((state.staleness for state in self.workers), Counter())
        return {
            "staleness": {str(stale): count for stale, count in sorted(reads.items())},
            "updates": sum(self.versions),
            "clocks": [state.clock for state in self.workers],
        }
