"""What a rank says of its step, and the verdict that all ranks then know alike, before one of them updates anything.

    own      squares finite unused edits buffers written passes    each rank's own; what follows of all is the same
    common   number zero_grads begun failed numbered total hypers  equal on all ranks, or no rank updates anything

One small exchange carries both. While ranks agree, comparing is one comparison of bytes for each rank. Where they do
not, :mod:`.drift` has the words.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch

from ..precision.loss_scale import LossScale
from ..runtime.control import exchange_records
from ..runtime.group import Group
from .buffers import Buffers
from .counts import StepCounts
from .drift import UNCOUNTED, UNKNOWN, Common, require_together
from .hypers import HyperParameters
from .passes import Passes
from .structure import Structure

_OWN = struct.Struct("<d??QQ?HH")
_COMMON = struct.Struct("<qHHH?d8s")
_MOST = 0xFFFF

_STEPS_ALIKE = 2
"""After so many steps in which all ranks called the model equally often, one that calls it more often is odd."""


class Verdict(NamedTuple):
    """What all ranks know of a step's reduced gradient."""

    squares: float
    """The sum of the squares of all numbers, times the square of the loss scale; 0 where nobody wants the norm."""
    finite: bool
    """Whether there is no inf or NaN in the reduced gradient, nor was in the numbers that any rank packed, nor in a
    loss that any rank has looked at."""
    unused: set[int]
    """Parameters (by index) without a gradient on any rank."""
    buffers: int = 0
    """The buffers that any rank has written since they were last alike, a bit for each
    (:class:`.buffers.Buffers`)."""
    written: bool = False
    """Whether any rank has written parameters, or put in another optimizer state, between the steps."""
    edits: tuple[int, ...] = ()
    """Of every rank: the digest of what its user has edited (:class:`.edits.Edits`)."""


class StepRecord:
    """This rank's record of the step that is under way. ``optimizer``, ``loss_scale`` and ``counts`` are what the step
    updates with and divides by; of ``structure`` and ``buffers`` the record says what was written between the steps.
    ``looks_at_losses``: whether a loss that is not finite makes the step so."""

    def __init__(
        self,
        group: Group,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_scale: LossScale | None,
        counts: StepCounts,
        structure: Structure,
        buffers: Buffers,
        *,
        looks_at_losses: bool,
    ):
        self.number: int | None = None
        """The caller's own number of the step; None: the engine's."""
        self.zero_grads = 0
        """Calls of ``zero_grad()`` since the last step."""
        self.begun = 0
        """Calls of ``backward()`` outside ``no_sync()`` since the last step."""
        self.losses = 0
        """Calls of ``backward()`` with a loss since the last step."""
        self.losses_finite: list[torch.Tensor] = []
        """bool[] of each loss of the step that is under way, where anybody looks at them."""
        self._looks_at_losses = looks_at_losses
        self._group, self._counts, self._structure, self._buffers = group, counts, structure, buffers
        self._hypers = HyperParameters(optimizer, loss_scale)
        self._passes = Passes(model)
        self._steps = 0
        self._steps_alike = 0
        """Steps in which all ranks had as many forward passes for each backward pass; less than 0 for good after one
        in which they had not."""

    def backward_begins(self, loss: torch.Tensor | None, syncing: bool) -> None:
        """A call of ``backward(loss)`` has passed the checks; ``syncing``: outside ``no_sync()``."""
        self.begun += syncing
        self.losses += loss is not None
        if self._looks_at_losses and loss is not None:
            self.losses_finite.append(loss.detach().isfinite().all())

    def step_begins(self, number: int | None, steps: int) -> None:
        """A call of ``step(number)`` has passed the checks, after ``steps`` steps that the engine has made."""
        self.number, self._steps = number, steps

    def gradients_dropped(self) -> None:
        """A call of ``zero_grad()``."""
        self.zero_grads += 1
        self.losses_finite.clear()

    def reset(self) -> None:
        """Begin a new step, after one that was made, or dropped, on all ranks."""
        self.number, self.zero_grads, self.begun, self.losses = None, 0, 0, 0
        self.losses_finite.clear()
        self._passes.begun = self._passes.ended = 0

    def loss_is_finite(self) -> bool:
        """Whether all losses of the step that were looked at are finite. Waits for a GPU."""
        return all(map(bool, self.losses_finite))

    def close(self) -> None:
        """Take the hooks off the model."""
        self._passes.close()

    def agree(self, squares: float, finite: bool, used: set[int] | None, parameters: int, edits: int = 0) -> Verdict:
        """One small exchange: the squares, summed in rank order so that all ranks get the same bits, whether all
        gradients are finite, whether all ranks are in the same step and would update alike, and whether any rank has
        unused parameters; if so, a second one finds those unused on all. Collective.

        ``squares``: of the numbers that this rank answers for; those of all ranks make up the whole. ``finite``:
        whether all that this rank has packed is. ``used``: which of so many ``parameters`` (by index) have a gradient
        on this rank; None: all. ``edits``: a digest of what this rank's user has edited.
        DisagreementError, on all ranks, where they are not in the same step, or would not update alike.
        """
        group = self._group
        finite = finite and math.isfinite(squares) and self.loss_is_finite()
        unused = set() if used is None else set(range(parameters)) - used
        if group.size == 1:
            return Verdict(squares, finite, unused, edits=(edits,))
        passes, buffers, common = self._passes, self._buffers, self._common()
        written_buffers = buffers.written() if buffers.count else 0
        written = self._structure.was_written()
        calls = min(passes.ended, _MOST), min(self.losses, _MOST)
        own = _OWN.pack(squares, finite, bool(unused), edits, written_buffers, written, *calls)
        records = exchange_records(group, own + common, "step")
        rows = [_OWN.unpack_from(each) for each in records]
        all_squares, finites, some_unused, all_edits, all_buffers, any_written, forwards, losses = zip(
            *rows, strict=True
        )
        odd = self._odd_ranks(forwards, losses)
        if odd or any(each[_OWN.size :] != common for each in records):
            everyones = [Common._make(_COMMON.unpack_from(each, _OWN.size)) for each in records]
            require_together(group, everyones, odd, self._hypers)
        if any(some_unused):
            unused = unused_on_all(group, set(range(parameters)) if used is None else used, parameters)
        return Verdict(sum(all_squares), all(finites), unused, reduce(or_, all_buffers), any(any_written), all_edits)

    def _common(self) -> bytes:
        """The part that must be equal on all ranks, as :class:`.drift.Common` names it."""
        counts, passes, number = self._counts, self._passes, self.number
        total = counts.total if counts.counted else UNCOUNTED
        return _COMMON.pack(
            self._steps if number is None else number,
            min(self.zero_grads, _MOST),
            min(self.begun, _MOST),
            min(passes.begun - passes.ended, _MOST),
            number is not None,
            UNKNOWN if total is None else total,
            self._hypers.digest(),
        )

    def _odd_ranks(self, forwards: Sequence[int], losses: Sequence[int]) -> list[int]:
        """The ranks that have called the model more often for each loss than others have, where ranks never differed
        in this before. ``forwards``, ``losses``: of each rank since the last step, the forward passes that have ended
        and the losses that were given to ``backward()``; equal on all ranks."""
        ratios = [passes / given if given else 0.0 for passes, given in zip(forwards, losses, strict=True)]
        present = {ratio for ratio in ratios if ratio}
        if len(present) < 2:
            self._steps_alike += self._steps_alike >= 0 and bool(present)
            return []
        if self._steps_alike >= _STEPS_ALIKE:
            return [rank for rank, ratio in enumerate(ratios) if ratio > min(present)]
        self._steps_alike = -1
        return []


def unused_on_all(group: Group, used: set[int], count: int) -> set[int]:
    """Which of ``count`` parameters (by index) have a gradient on no rank. ``used``: those that have one on this rank.
    Collective."""
    used_here = bytearray(count)
    for index in used:
        used_here[index] = 1
    maps = exchange_records(group, bytes(used_here), "used parameters")
    return {index for index in range(count) if not any(row[index] for row in maps)}
