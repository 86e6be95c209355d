"""Reads on a server: answered when the consistency allows, and kept until then."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ...errors import CommlabError
from .. import frames
from ..consistency import lacking
from ..frames import Entry
from ..messages import Header, Kind
from .ledger import Ledger, Waiting


class _Allowed(NamedTuple):
    """The parts of a read that may be answered now, and how many clocks each lacks."""

    header: Header
    entries: list[Entry]
    staleness: list[int]


class Reads:
    """The reads of one server. Who knows what the values contain decides when to try the waiting reads again."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self.queues: dict[int, deque[Waiting]] = {}
        """Reads that wait, by the event that they wait for."""
        self.allowed: dict[tuple[int, int], _Allowed] = {}
        """Reads that may be answered now, by worker and sequence number."""
        self._encoded: dict[tuple[int, int, int], tuple[int, torch.Tensor]] = {}
        """The last values that were sent of each span and wire, with the sum of their versions."""

    def read(self, worker: int, header: Header, entry: Entry, since_s: float, contained: int, event: int) -> None:
        """Let the next :meth:`answer` answer this part of the read ``header``, whose values contain ``contained``
        clocks of every worker; where the consistency does not allow that yet, keep the part until ``event``.
        ``since_s``: when the read came."""
        ledger, clock = self._ledger, header.clock
        consistency = ledger.rules.consistency
        if not consistency.may_read(clock, contained):
            waiting = Waiting(worker, header, since_s, *entry)
            self.queues.setdefault(event, deque()).append(waiting)
            return
        stale = lacking(clock, contained)
        if not consistency.keeps(stale):
            raise CommlabError(
                f"server {ledger.index} answered a read of {ledger.shard.names[entry[0]]!r} at clock {clock} that "
                f"lacks {stale} clocks, which {consistency.name} does not allow: a fault of commlab"
            )
        ledger.workers[worker].staleness[stale] += 1
        allowed = self.allowed.get((worker, header.sequence))
        if allowed is None:
            allowed = self.allowed[worker, header.sequence] = _Allowed(header, [], [])
        allowed.entries.append(entry)
        allowed.staleness.append(stale)

    def take(self, events: Iterable[int]) -> list[Waiting]:
        """Take out the reads that wait for ``events``; of one event in the order in which they came."""
        return [waiting for event in events for waiting in self.queues.pop(event, ())]

    def answer(self) -> None:
        """Answer the reads that are allowed, with the values as they are now; those of one frame in one message."""
        everything, self.allowed = self.allowed, {}
        for (worker, _), (header, entries, staleness) in everything.items():
            answer = header._replace(value=float(max(staleness)))
            if header.kind == Kind.PULL_FRAME:
                entries.sort()
                answer = answer._replace(key=len(entries))
                self._ledger.answer(worker, answer, Kind.VALUES_FRAME, self._encode_frame(header, entries))
            else:
                version = min(self._ledger.shard.versions[header.key : header.key + header.slices])
                self._ledger.answer(worker, answer._replace(clock=version), Kind.VALUES, self._encode(header))

    def _encode_frame(self, header: Header, entries: list[Entry]) -> torch.Tensor:
        shard = self._ledger.shard
        versions = [
            shard.versions[first] if slices == 1 else min(shard.versions[first : first + slices])
            for first, slices in entries
        ]
        spans = shard.spans(index for first, slices in entries for index in range(first, first + slices))
        values = [shard.values[span.dtype][span.where.start : span.where.stop].to(header.dtype) for span in spans]
        return frames.pack(entries, torch.cat(values), versions)

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
