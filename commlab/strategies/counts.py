"""What one step's gradient is divided by: how many items (tokens) all ranks' losses were summed over."""

from __future__ import annotations

import torch

from ..collectives.allreduce import allreduce_async
from ..errors import UsageError
from ..runtime.group import Group
from ..runtime.handle import Handle


class StepCounts:
    """The counts given to one step's ``backward()`` calls, over ranks and micro-batches."""

    count: int
    """How many items this rank's losses of the step were summed over, so far."""
    counted: bool | None
    """Whether the step's ``backward()`` calls give counts; None before the step's first one."""
    divisor: float
    """What the step's losses are divided by before backward, so that a sum over thousands of tokens leaves fp16 room
    for the loss scale: 1, or after :meth:`make_room` about the count of one rank."""
    _total: int | None
    """The global count, where the caller knows it."""
    _summing: Handle | None
    """The sum of all ranks' counts, under way, where the caller does not know it."""

    def __init__(self, group: Group):
        self._group = group
        self.reset()

    def reset(self) -> None:
        """Begin a new step."""
        self.count, self.counted, self.divisor, self._total, self._summing = 0, None, 1.0, None, None
        self._has_room = False

    def require_alike(self, count: int | None) -> None:
        """UsageError where one call of a step gives a count and another does not."""
        if self.counted is not None and self.counted != (count is not None):
            raise UsageError("within one step either every backward() call is given a count, or none")

    def add(self, count: int | None, total: int | None) -> None:
        """Take in the ``count`` and ``total`` of one ``backward()`` call."""
        self.counted = count is not None
        self.count += count or 0
        self._total = total

    def sum_counts(self) -> None:
        """Start to add the ranks' counts up, where no caller has given the total. Collective."""
        if self.counted and self._total is None:
            counted = torch.tensor([self.count], dtype=torch.int64, device="cpu")
            self._summing = allreduce_async(counted, "sum", "token count", group=self._group)

    def make_room(self) -> None:
        """Choose :attr:`divisor` so that sums of losses become about means. All micro-batches of a step have one
        divisor: only the step's first call chooses it."""
        if not self._has_room:
            self._has_room = True
            self.divisor = max(1.0, self._total / self._group.size if self._total is not None else 1.0)

    def scale_for_mean(self) -> float:
        """What this rank multiplies its gradient by, so that the mean over ranks is the step's gradient."""
        return self.divisor * (self._group.size / self._global_count() if self.counted else 1.0)

    def scale_alone(self) -> float:
        """What this rank multiplies its gradient by, where its gradient is an update of its own."""
        return 1 / max(1, self.count) if self.counted else 1.0

    def _global_count(self) -> int:
        if self._total is not None:
            return max(1, self._total)
        assert self._summing is not None
        return max(1, int(self._summing.wait().item()))
