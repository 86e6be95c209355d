"""Reads on a server: answered when the consistency allows, and kept until then."""

from __future__ import annotations

from collections import deque

import torch

from ...errors import CommlabError
from ..consistency import lacking
from ..messages import Header, Kind
from .ledger import Ledger, Waiting


class Reads:
    """The reads of one server. Who knows what the values contain decides when to try the waiting reads again."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self.queues: dict[int, deque[Waiting]] = {}
        """Reads that wait, by the event that they wait for."""
        self._encoded: dict[tuple[int, int, int], tuple[int, torch.Tensor]] = {}
        """The last values that were sent of each span and wire, with the sum of their versions."""

    def read(self, waiting: Waiting, contained: int, event: int) -> None:
        """Answer a read of values that contain ``contained`` clocks of every worker; where the consistency does not
        allow that yet, keep the read until ``event``."""
        ledger, header = self._ledger, waiting.header
        consistency = ledger.rules.consistency
        if not consistency.may_read(header.clock, contained):
            self.queues.setdefault(event, deque()).append(waiting)
            return
        stale = lacking(header.clock, contained)
        if not consistency.keeps(stale):
            raise CommlabError(
                f"server {ledger.index} answered a read of {ledger.shard.names[header.key]!r} at clock {header.clock} "
                f"that lacks {stale} clocks, which {consistency.name} does not allow: a fault of commlab"
            )
        ledger.workers[waiting.worker].staleness[stale] += 1
        version = min(ledger.shard.versions[header.key : header.key + header.slices])
        answer = header._replace(value=float(stale), clock=version)
        ledger.answer(waiting.worker, answer, Kind.VALUES, self._encode(header))

    def take(self, event: int) -> deque[Waiting]:
        """Take out the reads that wait for ``event``, in the order in which they came."""
        return self.queues.pop(event, deque())

    def _encode(self, header: Header) -> torch.Tensor:
        """The values of the slices as they travel: a copy, because the values may be updated while they are on their
        way; one copy for all who read the same versions."""
        shard = self._ledger.shard
        key = header.key, header.slices, header.wire
        versions = sum(shard.versions[header.key : header.key + header.slices])
        found = self._encoded.get(key)
        if found is None or found[0] != versions:
            span = shard.span(header.key, header.slices)
            assert span is not None and header.dtype is not None
            dtype, where = span
            numbers = shard.values[dtype][where.start : where.stop].to(header.dtype, copy=True)
            found = self._encoded[key] = versions, numbers.view(torch.uint8)
        return found[1]
