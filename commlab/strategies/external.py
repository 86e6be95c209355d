"""Strategies whose gradients commlab does not move: ``single``, where nothing is sent, and the base of ``ddp`` and
``horovod``, where a library reduces them. ``p.grad`` is complete when backward and that library are done.

    backward | scale by the count | the user may edit p.grad | norm | the ranks' records | clip | optimizer on all ranks
"""

from __future__ import annotations

import math

import torch

from ..errors import UsageError
from ..gradients.bucket import Bucket
from ..gradients.hooks import GradientBuckets, Waitable
from ..native.norm import norm_squared, scale_
from ..runtime.group import Group
from .changes import Roster
from .edits import Edits
from .options import Options
from .protocol import Strategy
from .reduced import ReducedGradient, whole_gradients
from .start import start
from .verdict import Verdict


class External(Strategy):
    """Norm, clip and step on whole gradients."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        self.training = training = start(model, optimizer, group, options)
        self.buckets = GradientBuckets(
            [], self.launch, training.counts.scale_for_mean, group.progress.poll, keep_gradients=True
        )
        self._own()

    def _own(self) -> None:
        training = self.training
        training.masters.own_all()
        self.edits = Edits(training.group, training.parameters, instead=training.masters.instead)

    def launch(self, bucket: Bucket) -> Waitable:
        raise AssertionError(f"strategy {self.name} has no buckets, and was given {bucket.name}")

    def complete(self) -> None:
        training = self.training
        for item in training.parameters:
            gradient = item.tensor.grad
            if (
                gradient is not None
                and gradient.layout is not torch.strided
                and (training.counts.counted or training.wants_norm)
            ):
                raise UsageError(
                    f"the gradient of {item.name!r} is sparse, and can't be divided by a count nor clipped; use "
                    "sparse=False in its embedding"
                )
        scale_(self._gradients(), self.training.counts.scale_for_mean())
        self.edits.note_gradients()

    def forget(self) -> None:
        self.edits.forget_gradients()

    def _gradients(self) -> list[torch.Tensor]:
        return [item.tensor.grad for item in self.training.parameters if item.tensor.grad is not None]

    def reduced(self, scale: float) -> tuple[list[ReducedGradient], set[int]]:
        parameters = self.training.parameters
        unused = {item.index for item in parameters if item.tensor.grad is None}
        return whole_gradients(self.training, scale), unused

    def agree(self) -> Verdict:
        """Every rank has the whole gradient, and whoever reduced it has spread an inf or NaN to all ranks. What a
        library's exchange does not tell, whether ranks are in the same step and would update alike, takes a small
        exchange here: the only one that commlab adds to the library's."""
        training, edits = self.training, self.edits
        squares = norm_squared(self._gradients()) if training.wants_norm else 0.0
        refusal = edits.refusal()
        edited = edits.edited_gradients()
        digest = edits.digest(refusal, edited)
        # Of all ranks' equal squares rank 0's count.
        verdict = training.record.agree(
            0.0 if training.group.rank else squares, math.isfinite(squares), None, len(training.parameters), digest
        )
        edits.require_alike(verdict.edits, refusal, edited)
        return verdict

    def update(self, factor: float, unused: set[int]) -> None:
        self.training.masters.step(factor)

    def replan(self, roster: Roster) -> None:
        self.training.give_back(roster.members, sharded=False)
        self.training.replan(roster)
        self._own()

    def close(self, *, state: bool) -> None:
        self.training.give_back(self.training.members, sharded=False)


class Single(External):
    """One rank: what the other strategies are measured against, and must agree with."""

    name = "single"
