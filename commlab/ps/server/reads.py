"""Reads on a server: answered when the consistency allows, and until then kept."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from ...errors import CommlabError
from ..consistency import lacking
from ..messages import Header, Kind
from .ledger import State, Waiting


class Reads(State):
    """The layer that answers reads; see :mod:`commlab.ps.server.ledger`."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._reads: dict[int, deque[Waiting]] = {}
        """Reads that wait, by the part whose round they wait for; under SSP all at -1."""
        self._encoded: dict[tuple[int, int, int], tuple[int, torch.Tensor]] = {}

    def _contained(self, header: Header) -> int:
        """Clocks that the parts of a read have of every worker that is still there."""
        if self.rounds is not None:
            return min(self.rounds.completed[header.key : header.key + header.parts])
        return min((state.clock for state in self.workers if not state.left), default=header.clock)

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
