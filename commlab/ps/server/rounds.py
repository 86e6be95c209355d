"""BSP's rounds: one slot per worker, added in rank order, until all workers' numbers are in the sum.

Round c of a slice is complete when every worker has pushed the slice in clock c, or ended clock c without pushing it.
Numbers are added in rank order whatever the order in which they came, 16-bit numbers in fp32, and divided once; so the
bits do not depend on who was faster. The next round's numbers are not taken in before: a worker that is ahead keeps
them on its own side. Memory: a shard of sums, and one more for every worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ... import native
from ...chunks import Range
from ..messages import Header
from .ledger import Hypers
from .shard import Shard


class Rounds:
    """The rounds of all slices of a shard. ``names``: what messages call the workers."""

    def __init__(self, shard: Shard, names: Sequence[str]):
        self._shard, self._names = shard, names
        slices = len(shard.slices)
        self.completed = [0] * slices
        """How many rounds of each slice have ended."""
        self.added: list[list[int]] = [[] for _ in range(slices)]
        """By slice: the workers whose numbers are in the sum of the open round, in the order of their addition."""
        self.hypers: dict[int, tuple[int, Hypers]] = {}
        """By clock: the first worker that pushed, and the hyper-parameters that its push came with."""
        self._passed = [0] * slices
        """By slice: how many workers, in rank order, have been added to the sum, or have nothing to add."""
        self._pushed: list[dict[int, Header]] = [{} for _ in range(slices)]
        """By slice: the pushes of the open round, by worker."""
        self._slots: dict[tuple[int, torch.dtype, torch.dtype], torch.Tensor] = {}
        self._sums = {
            dtype: torch.zeros(numel, dtype=torch.float32 if dtype.itemsize == 2 else dtype, device="cpu")
            for dtype, numel in shard.numel.items()
        }

    def against(self, worker: int, header: Header, hypers: Hypers) -> str:
        """Why a push can't belong to the round of its clock; empty if it can."""
        slices = range(header.key, header.key + header.slices)
        what = f"{self._shard.names[header.key]!r} was pushed by {self._names[worker]}"
        if any(self.completed[index] > header.clock or worker in self._now(index, header.clock) for index in slices):
            return f"{what} twice in clock {header.clock}; add the two first, or call step() in between"
        first, agreed = self.hypers.get(header.clock, (worker, hypers))
        if hypers != agreed:
            return (
                f"{what} to be updated with {_differing(hypers, agreed)} in clock {header.clock}, by "
                f"{self._names[first]} with {_differing(agreed, hypers)}; under bsp the pushes of a clock are one "
                "update, so all workers must give the same hyper-parameters"
            )
        return ""

    def _now(self, index: int, clock: int) -> dict[int, Header]:
        return self._pushed[index] if self.completed[index] == clock else {}

    def is_ahead(self, header: Header) -> bool:
        """Whether the push belongs to a round that is not open yet."""
        return any(self.completed[index] < header.clock for index in range(header.key, header.key + header.slices))

    def slot(self, worker: int, wire: torch.dtype, dtype: torch.dtype, where: Range) -> torch.Tensor:
        """Memory in which a worker's numbers of ``wire`` wait to be added to those of ``dtype`` at ``where``."""
        key = worker, wire, dtype
        if key not in self._slots:
            self._slots[key] = torch.empty(self._shard.numel[dtype], dtype=wire, device="cpu")
        return self._slots[key][where.start : where.stop]

    def take(self, worker: int, header: Header, hypers: Hypers) -> None:
        """Note that the numbers of this push are in their slot."""
        self.hypers.setdefault(header.clock, (worker, hypers))
        for index in range(header.key, header.key + header.slices):
            self._pushed[index][worker] = header

    def add(self, slices: Iterable[int], clocks: Sequence[int]) -> list[int]:
        """Add the numbers that are there and next in rank order; returns the slices whose rounds became complete, their
        sums divided. ``clocks``: how many clocks each worker has ended."""
        complete = []
        for index in slices:
            if self._passed[index] == len(clocks):
                continue
            while self._passed[index] < len(clocks):
                worker = self._passed[index]
                if worker in self._pushed[index]:
                    self._add_slot(index, worker)
                elif clocks[worker] <= self.completed[index]:
                    break
                self._passed[index] += 1
            else:
                if self.added[index]:
                    owned = self._shard.slices[index]
                    native.divide(self._sums[self._shard.dtypes[index]], owned.offset, owned.numel, len(clocks))
                complete.append(index)
        return complete

    def _add_slot(self, index: int, worker: int) -> None:
        wire, dtype, owned = self._pushed[index][worker].dtype, self._shard.dtypes[index], self._shard.slices[index]
        assert wire is not None
        where = Range(owned.offset, owned.offset + owned.numel)
        slot, sums = self.slot(worker, wire, dtype, where), self._sums[dtype]
        if not self.added[index]:
            sums[where.start : where.stop].copy_(slot)
        elif wire == sums.dtype:
            native.reduce(sums, where.start, slot, 0, where.numel, "sum")
        elif sums.dtype == torch.float32:
            native.accumulate(sums, where.start, slot, 0, where.numel, "sum")
        else:
            sums[where.start : where.stop].add_(slot)
        self.added[index].append(worker)

    def mean(self, index: int) -> torch.Tensor:
        """The mean of a slice's complete round, in fp32 where values have 16 bits. Workers that pushed nothing count as
        zeros."""
        owned = self._shard.slices[index]
        return self._sums[self._shard.dtypes[index]][owned.offset : owned.offset + owned.numel]

    def end(self, slices: Iterable[int]) -> None:
        """Open the next round of ``slices``."""
        for index in slices:
            self.completed[index] += 1
            self._passed[index] = 0
            self._pushed[index].clear()
            self.added[index].clear()
        slowest = min(self.completed, default=0)
        for clock in [clock for clock in self.hypers if clock < slowest]:
            del self.hypers[clock]


def _differing(hypers: Hypers, other: Hypers) -> str:
    """The first hyper-parameter of ``hypers`` that ``other`` has otherwise, as text."""
    if hypers.scale != other.scale:
        return f"gradients scaled by {hypers.scale:g}"
    for at, (mine, theirs) in enumerate(zip(hypers.groups or (), other.groups or (), strict=False)):
        for key, value in mine.items():
            if theirs.get(key) != value:
                return f"{key}={value!r} in group {at}"
    return f"{len(hypers.groups or ())} groups"
