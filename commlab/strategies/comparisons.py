"""What an engine compares in every step, so that ranks that have drifted apart are named instead of averaged: the
step's record, the copies that every rank has, and the buffers that forward has written.

    backward    a pass begins; is its loss finite?
    step        the record travels with the verdict | copies are compared, now and then | buffers are made alike
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import Any

import torch

from ..gradients.parameters import parameters_by_name
from ..runtime.control import gather_bytes
from .copies import require_alike
from .protocol import Strategy
from .verdict import Verdict


class Comparisons:
    """The comparisons of the ranks that train by ``strategy``. The engine tells it what begins and ends a step."""

    def __init__(self, strategy: Strategy):
        self._strategy, self._training = strategy, strategy.training
        self._looks_at_losses = (
            self._training.options.nonfinite != "torch" and self._training.precision.loss_scale is None
        )
        self._written_steps = 0
        """Steps in a row before which a rank had written parameters."""
        self.took_note()

    def took_note(self) -> None:
        """What this rank has now, all ranks have."""
        self._note_values()
        self._training.buffers.seen()

    def _note_values(self) -> None:
        if self._training.group.size > 1:
            self._training.structure.took_note()

    # A step.

    def backward_begins(self, loss: torch.Tensor | None) -> None:
        """A call of ``backward(loss)`` has passed the checks."""
        training = self._training
        training.record.begun += self._strategy.buckets.syncing
        training.record.losses += loss is not None
        if self._looks_at_losses and loss is not None:
            training.record.losses_finite.append(loss.detach().isfinite().all())

    def step_begins(self, number: int | None) -> None:
        """A call of ``step(number)`` has passed the checks; the verdict follows."""
        self._training.record.step_begins(number, self._training.steps)

    def compare_replicas(self, verdict: Verdict) -> None:
        """Compare what all ranks have copies of, where it is time. Collective, before anything is updated."""
        training, every = self._training, self._training.options.check_replicas
        if training.group.size == 1 or not self._strategy.averages:
            return
        # A loop that writes parameters after each of its steps has them compared ever less often.
        self._written_steps = self._written_steps + 1 if verdict.written else 0
        written = self._written_steps and not self._written_steps & (self._written_steps - 1)
        if written or (every and (training.steps + 1) % every == 0):
            self._compare()

    def _compare(self) -> None:
        """Compare what ranks have copies of. Collective."""
        require_alike(self._training.group, self._training.steps, self._copies())
        self._strategy.compare_shards()

    def _copies(self) -> Iterator[tuple[str, Any]]:
        """What must be equal on all ranks, by name. Buffers become alike by their rule instead."""
        training = self._training
        yield from self._strategy.replicas()
        trained = {item.name for item in training.parameters}
        for name, tensor in parameters_by_name(training.model):
            if name not in trained:
                yield repr(name), tensor.detach()

    def step_ends(self, verdict: Verdict) -> None:
        """The step was made, or skipped, on all ranks. Collective, where buffers were written."""
        training = self._training
        every = training.options.check_replicas
        if self._strategy.averages:
            if verdict.buffers:
                training.buffers.make_alike(verdict.buffers)
            if every and (training.steps + 1) % every == 0:
                training.buffers.make_all_alike()
        self.step_dropped()
        self._note_values()

    def step_dropped(self) -> None:
        """The step was dropped on all ranks."""
        self._training.record.reset()
        self._training.record.losses_finite.clear()

    def gradients_dropped(self) -> None:
        """A call of ``zero_grad()``."""
        self._training.record.zero_grads += 1
        self._training.record.losses_finite.clear()

    # Between steps.

    def settle(self) -> None:
        """Make buffers alike, and compare what all ranks have copies of. Collective."""
        training = self._training
        if training.group.size == 1:
            return
        if training.buffers.count:
            own = training.buffers.written().to_bytes(8, "little")
            everyones = gather_bytes(training.group, own, "buffers that were written")
            training.buffers.make_alike(reduce(or_, (int.from_bytes(each, "little") for each in everyones)))
            training.buffers.make_all_alike()
        self._compare()

    def close(self) -> None:
        """Take the hooks off the model."""
        self._training.record.close()
