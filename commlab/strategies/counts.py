"""What one step's gradient is divided by: how many items (tokens) all ranks' losses were summed over."""

from __future__ import annotations

import torch

from ..collectives.allreduce import allreduce_async
from ..errors import UsageError
from ..runtime.group import Group
from ..runtime.handle import Handle


class StepWeight:
    """The counts given to one step's ``backward()`` calls, over ranks and micro-batches."""

    count: int
    """Of this rank's items, so far."""
    counted: bool | None
    """Whether there are counts; None before the step's first backward."""
    _total: int | None
    _global_count: Handle | None
    _share: float

    def __init__(self, group: Group):
        self._group = group
        self.reset()

    def reset(self) -> None:
        """A new step begins."""
        self.count, self._total, self.counted, self._global_count = 0, None, None, None
        self._share = 0.0

    def require_alike(self, count: int | None) -> None:
        """UsageError where one call of a step gives a count and another does not."""
        if self.counted is not None and self.counted != (count is not None):
            raise UsageError("within one step either every backward() call is given a count, or none")

    def add(self, count: int | None, total: int | None) -> None:
        """What one ``backward()`` was given."""
        self.counted = count is not None
        self.count += count or 0
        self._total = total

    def sum_counts(self) -> None:
        """Start to add the ranks' counts up, where nobody has told the total. Collective."""
        if self.counted and self._total is None:
            counted = torch.tensor([self.count], dtype=torch.int64)
            self._global_count = allreduce_async(counted, "sum", "token count", group=self._group)

    def make_room(self) -> None:
        """A sum over thousands of tokens would leave fp16 no room for the loss scale: it becomes about a mean before
        backward. The same for all micro-batches of a step."""
        if not self._share:
            self._share = max(1.0, self._total / self._group.size if self._total is not None else 1.0)

    @property
    def share(self) -> float:
        """What this step's losses are divided by on their way into fp16."""
        return self._share or 1.0

    def local_scale(self) -> float:
        """What this rank multiplies its gradient by, so that the mean over ranks is the step's gradient."""
        return self.share * (self._group.size / self._total_count() if self.counted else 1.0)

    def _total_count(self) -> int:
        if self._total is not None:
            return max(1, self._total)
        assert self._global_count is not None
        return max(1, int(self._global_count.wait().item()))
