"""What one step's gradient is divided by: how many items (tokens) all ranks' losses were summed over, or how much they
weigh."""

from __future__ import annotations

import math
from typing import SupportsFloat

import torch

from ..collectives.allreduce import allreduce_async
from ..errors import UsageError
from ..runtime.group import Group
from ..runtime.handle import Handle


class StepCounts:
    """The counts given to one step's ``backward()`` calls, over ranks and micro-batches: float64, so that sums of
    weights are right, and whole numbers up to 2^53 exact."""

    count: float
    """How many items this rank's losses of the step were summed over, so far, or the sum of their weights."""
    counted: bool | None
    """Whether the step's ``backward()`` calls give counts; None before the step's first one."""
    divisor: float
    """What the step's losses are divided by before backward, so that a sum over thousands of tokens leaves fp16 room
    for the loss scale: 1, or after :meth:`make_room` about the count of one rank."""
    total: float | None
    """The global count, where the caller knows it."""
    _summing: Handle | None
    """The sum of all ranks' counts, under way, where the caller does not know it."""

    def __init__(self, group: Group):
        self._group = group
        self.reset()

    def reset(self) -> None:
        """Begin a new step."""
        self.count, self.counted, self.divisor, self.total, self._summing = 0.0, None, 1.0, None, None
        self._has_room = False

    def require_alike(self, count: float | None) -> None:
        """UsageError where one call of a step gives a count and another does not."""
        if self.counted is not None and self.counted != (count is not None):
            raise UsageError("within one step either every backward() call is given a count, or none")

    def add(self, count: SupportsFloat | None, total: SupportsFloat | None) -> None:
        """Take in the ``count`` and ``total`` of one ``backward()`` call. UsageError for one that is negative, infinite
        or NaN, and for a total without a count."""
        rank = self._group.rank
        if count is None and total is not None:
            raise UsageError(f"rank {rank}: backward() was given total={total} without a count; give it both")
        own, everyone = _checked(rank, "count", count), _checked(rank, "total", total)
        self.counted = own is not None
        self.count += own or 0.0
        self.total = everyone

    def sum_counts(self) -> None:
        """Start to add the ranks' counts up, where no caller has given the total. Collective."""
        if self.counted and self.total is None:
            counted = torch.tensor([self.count], dtype=torch.float64, device="cpu")
            self._summing = allreduce_async(counted, "sum", "token count", group=self._group)

    def make_room(self) -> None:
        """Choose :attr:`divisor` so that sums of losses become about means. All micro-batches of a step have one
        divisor: only the step's first call chooses it."""
        if not self._has_room:
            self._has_room = True
            self.divisor = max(1.0, self.total / self._group.size if self.total is not None else 1.0)

    def scale_for_mean(self) -> float:
        """What this rank multiplies its gradient by, so that the mean over ranks is the step's gradient: 0 where the
        global count is 0."""
        if not self.counted:
            return self.divisor
        everyone = self._global_count()
        return self.divisor * self._group.size / everyone if everyone else 0.0

    def scale_alone(self) -> float:
        """What this rank multiplies its gradient by, where its gradient is an update of its own."""
        if not self.counted:
            return 1.0
        return 1 / self.count if self.count else 0.0

    def _global_count(self) -> float:
        if self.total is not None:
            return self.total
        assert self._summing is not None
        return float(self._summing.wait().item())


def _checked(rank: int, name: str, value: SupportsFloat | None) -> float | None:
    """A count as float64."""
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(f"rank {rank}: backward() was given {name}={value!r}, no number: {error}") from error
    if not 0 <= found < math.inf:
        raise UsageError(
            f"rank {rank}: backward() was given {name}={found:g}; it is how many items the loss was summed over, or "
            "the sum of their weights: 0 or more, and finite"
        )
    return found
