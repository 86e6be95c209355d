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
from ..frames import Entry
from ..hypers import Hypers
from ..messages import NO_WIRE, Header
from .shard import OwnedSpan, Shard


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
        self._pushed: list[dict[int, torch.dtype | None]] = [{} for _ in range(slices)]
        """By slice: who has pushed in the open round, and the dtype of the numbers; None: there was no gradient."""
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
        if header.wire == NO_WIRE:
            return ""  # nothing is to be updated
        first, agreed = self.hypers.get(header.clock, (worker, hypers))
        if hypers != agreed:
            return (
                f"{what} to be updated with {_differing(hypers, agreed)} in clock {header.clock}, by "
                f"{self._names[first]} with {_differing(agreed, hypers)}; under bsp the pushes of a clock are one "
                "update, so all workers must give the same hyper-parameters"
            )
        return ""

    def _now(self, index: int, clock: int) -> dict[int, torch.dtype | None]:
        return self._pushed[index] if self.completed[index] == clock else {}

    def reach(self, index: int, worker: int, clock: int) -> int:
        """How many rounds of a slice can end without any more of ``worker``, who has ended ``clock`` clocks."""
        return max(clock, self.completed[index] + (worker in self._pushed[index]))

    def is_ahead(self, clock: int, entries: Iterable[Entry]) -> bool:
        """Whether a push of ``clock`` belongs to a round of these entries that is not open yet."""
        completed = self.completed
        return any(min(completed[first : first + slices], default=clock) < clock for first, slices in entries)

    def slot(self, worker: int, wire: torch.dtype, dtype: torch.dtype, where: Range) -> torch.Tensor:
        """Memory in which a worker's numbers of ``wire`` wait to be added to those of ``dtype`` at ``where``."""
        key = worker, wire, dtype
        if key not in self._slots:
            self._slots[key] = torch.empty(self._shard.numel[dtype], dtype=wire, device="cpu")
        return self._slots[key][where.start : where.stop]

    def take(self, worker: int, clock: int, slices: Iterable[int], wire: torch.dtype | None, hypers: Hypers) -> None:
        """Note that the numbers of ``wire`` that ``worker`` has pushed of ``slices`` are in their slot; None: the
        worker has no gradient of them."""
        if wire is not None:
            self.hypers.setdefault(clock, (worker, hypers))
        for index in slices:
            self._pushed[index][worker] = wire

    def add(self, slices: Iterable[int], clocks: Sequence[int]) -> list[int]:
        """Add the numbers that are there and next in rank order; returns the slices whose rounds became complete, their
        sums divided. ``clocks``: how many clocks each worker has ended."""
        complete: list[int] = []
        count, passed, completed = len(clocks), self._passed, self.completed
        additions: dict[tuple[int, torch.dtype], list[int]] = {}
        for index in slices:
            worker, pushed = passed[index], self._pushed[index]
            if worker == count:
                continue
            while worker < count:
                if worker in pushed:
                    wire = pushed[worker]
                    if wire is not None:
                        additions.setdefault((worker, wire), []).append(index)
                elif clocks[worker] <= completed[index]:
                    break
                worker += 1
            passed[index] = worker
            if worker == count:
                complete.append(index)
        # Of every slice in rank order.
        for worker, wire in sorted(additions, key=lambda addition: addition[0]):
            self._add_slots(worker, wire, additions[worker, wire])
        for span in self._shard.spans(index for index in complete if self.added[index]):
            native.divide(self._sums[span.dtype], span.where.start, span.where.numel, count)
        return complete

    def _add_slots(self, worker: int, wire: torch.dtype, slices: list[int]) -> None:
        first = [index for index in slices if not self.added[index]]
        later = [index for index in slices if self.added[index]] if len(first) < len(slices) else []
        for span in self._shard.spans(first):
            where = span.where
            self._sums[span.dtype][where.start : where.stop].copy_(self.slot(worker, wire, span.dtype, where))
        for span in self._shard.spans(later):
            where = span.where
            slot, sums = self.slot(worker, wire, span.dtype, where), self._sums[span.dtype]
            if wire == sums.dtype:
                native.reduce(sums, where.start, slot, 0, where.numel, "sum")
            elif sums.dtype == torch.float32:
                native.accumulate(sums, where.start, slot, 0, where.numel, "sum")
            else:
                sums[where.start : where.stop].add_(slot)
        for index in slices:
            self.added[index].append(worker)

    def mean(self, span: OwnedSpan) -> torch.Tensor:
        """The means of the complete rounds of slices that adjoin, in fp32 where values have 16 bits. Workers that
        pushed nothing count as zeros."""
        return self._sums[span.dtype][span.where.start : span.where.stop]

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
