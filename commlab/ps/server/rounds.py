"""BSP on a server: one slot per worker, added in rank order; a part's round is complete when all have had their say.

A part's round c is complete when every worker has pushed it in clock c, or ended clock c without. Numbers are added in
rank order whatever the order in which they came, 16-bit ones in fp32, and divided once; so the bits do not depend on
who was faster. The next round's numbers are not taken in before: who is ahead keeps them on its own side. Memory: a
shard of sums, and one more for every worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ... import native
from ...chunks import Range
from ..messages import Header
from .shard import Shard


class Hypers(NamedTuple):
    """What a worker's updates are made with. ``scale``: what its gradients were multiplied by."""

    groups: list[dict[str, Any]] | None = None
    scale: float = 1.0


class Rounds:
    """``names`` says in messages who the workers are."""

    def __init__(self, shard: Shard, names: Sequence[str]):
        self._shard, self._names = shard, names
        parts = len(shard.parts)
        self.completed = [0] * parts
        """Rounds of every part."""
        self.added: list[list[int]] = [[] for _ in range(parts)]
        """Workers whose numbers are in the sum of the part's round, in the order in which they were added."""
        self.hypers: dict[int, tuple[int, Hypers]] = {}
        """What a clock's updates are made with, and the worker that said so first."""
        self._heard = [0] * parts
        """Workers, in rank order, of which it is known what they add."""
        self._pushed: list[dict[int, Header]] = [{} for _ in range(parts)]
        self._slots: dict[tuple[int, torch.dtype, torch.dtype], torch.Tensor] = {}
        self._sums = {
            dtype: torch.zeros(numel, dtype=torch.float32 if dtype.itemsize == 2 else dtype)
            for dtype, numel in shard.numel.items()
        }

    def against(self, worker: int, header: Header, hypers: Hypers) -> str:
        """Why a push can't belong to the round of its clock; empty if it can."""
        run = range(header.key, header.key + header.parts)
        what = f"{self._shard.names[header.key]!r} was pushed by {self._names[worker]}"
        if any(self.completed[part] > header.clock or worker in self._now(part, header.clock) for part in run):
            return f"{what} twice in clock {header.clock}; add the two first, or call step() in between"
        first, agreed = self.hypers.get(header.clock, (worker, hypers))
        if hypers != agreed:
            return (
                f"{what} to be updated with {_differing(hypers, agreed)} in clock {header.clock}, by "
                f"{self._names[first]} with {_differing(agreed, hypers)}; under bsp the pushes of a clock are one "
                "update, so all workers must give the same hyper-parameters"
            )
        return ""

    def _now(self, part: int, clock: int) -> dict[int, Header]:
        return self._pushed[part] if self.completed[part] == clock else {}

    def is_ahead(self, header: Header) -> bool:
        """Whether the push belongs to a round that is not open yet."""
        return any(self.completed[part] < header.clock for part in range(header.key, header.key + header.parts))

    def slot(self, worker: int, wire: torch.dtype, dtype: torch.dtype, place: Range) -> torch.Tensor:
        """Where a worker's numbers wait."""
        key = worker, wire, dtype
        if key not in self._slots:
            self._slots[key] = torch.empty(self._shard.numel[dtype], dtype=wire)
        return self._slots[key][place.start : place.stop]

    def take(self, worker: int, header: Header, hypers: Hypers) -> None:
        """Note that the numbers of this push are in their slot."""
        self.hypers.setdefault(header.clock, (worker, hypers))
        for part in range(header.key, header.key + header.parts):
            self._pushed[part][worker] = header

    def add(self, parts: Iterable[int], clocks: Sequence[int]) -> list[int]:
        """Add what is there and next in rank order; returns the parts whose rounds became complete, their sums divided.
        ``clocks``: how many each worker has ended."""
        complete = []
        for part in parts:
            if self._heard[part] == len(clocks):
                continue
            while self._heard[part] < len(clocks):
                worker = self._heard[part]
                if worker in self._pushed[part]:
                    self._add_slot(part, worker)
                elif clocks[worker] <= self.completed[part]:
                    break
                self._heard[part] += 1
            else:
                if self.added[part]:
                    item = self._shard.parts[part]
                    native.divide(self._sums[self._shard.dtypes[part]], item.offset, item.numel, len(clocks))
                complete.append(part)
        return complete

    def _add_slot(self, part: int, worker: int) -> None:
        wire, dtype, item = self._pushed[part][worker].dtype, self._shard.dtypes[part], self._shard.parts[part]
        assert wire is not None
        place = Range(item.offset, item.offset + item.numel)
        slot, sums = self.slot(worker, wire, dtype, place), self._sums[dtype]
        if not self.added[part]:
            sums[place.start : place.stop].copy_(slot)
        elif wire == sums.dtype:
            native.reduce(sums, place.start, slot, 0, place.numel, "sum")
        elif sums.dtype == torch.float32:
            native.accumulate(sums, place.start, slot, 0, place.numel, "sum")
        else:
            sums[place.start : place.stop].add_(slot)
        self.added[part].append(worker)

    def mean(self, part: int) -> torch.Tensor:
        """Of a complete round; fp32 where values have 16 bits. Missing workers count as zeros."""
        item = self._shard.parts[part]
        return self._sums[self._shard.dtypes[part]][item.offset : item.offset + item.numel]

    def end(self, parts: Iterable[int]) -> None:
        """Open the next round of ``parts``."""
        for part in parts:
            self.completed[part] += 1
            self._heard[part] = 0
            self._pushed[part].clear()
            self.added[part].clear()
        slowest = min(self.completed, default=0)
        for clock in [clock for clock in self.hypers if clock < slowest]:
            del self.hypers[clock]


def _differing(hypers: Hypers, other: Hypers) -> str:
    """The first of ``hypers`` that ``other`` has otherwise, as text."""
    if hypers.scale != other.scale:
        return f"gradients scaled by {hypers.scale:g}"
    for at, (mine, theirs) in enumerate(zip(hypers.groups or (), other.groups or (), strict=False)):
        for key, value in mine.items():
            if theirs.get(key) != value:
                return f"{key}={value!r} in group {at}"
    return f"{len(hypers.groups or ())} groups"
