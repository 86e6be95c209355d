"""Strategies whose gradients commlab does not move: ``single``, where nothing is sent, and the base of ``ddp`` and
``horovod``, where a library reduces them. ``p.grad`` is complete when backward and that library are done.

    backward | scale by the count | norm | clip | optimizer on all ranks
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..gradients.bucket import Bucket
from ..gradients.hooks import GradientBuckets, Waitable
from ..native.norm import norm_squared, scale_
from ..runtime.group import Group
from .changes import Roster
from .options import Options
from .protocol import Strategy
from .start import start
from .verdict import Verdict, of_all_ranks


class External(Strategy):
    """Norm, clip and step on whole gradients. ``synchronize``: see :func:`.start.start`."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        group: Group,
        options: Options,
        synchronize: Callable[[], None] | None = None,
    ):
        self.training = training = start(model, optimizer, group, options, synchronize=synchronize)
        training.masters.own_all()
        self.buckets = GradientBuckets(
            [], self.launch, training.counts.scale_for_mean, group.progress.poll, keep_gradients=True
        )

    def backward(self, loss: torch.Tensor | None) -> None:
        if loss is not None:
            loss.backward()

    def launch(self, bucket: Bucket) -> Waitable:
        raise AssertionError(f"strategy {self.name} has no buckets, and was given {bucket.name}")

    def agree(self) -> Verdict:
        """Every rank has the whole gradient, so nothing is exchanged: whoever reduced it has spread an inf or NaN to
        all ranks."""
        training = self.training
        gradients = [item.tensor.grad for item in training.parameters if item.tensor.grad is not None]
        scale_(gradients, training.counts.scale_for_mean())
        return of_all_ranks(norm_squared(gradients) if training.wants_norm else 0.0)

    def update(self, factor: float, unused: set[int]) -> None:
        self.training.masters.step(factor)

    def replan(self, roster: Roster) -> None:
        self.training.give_back(roster.members, sharded=False)
        self.training.replan(roster)
        self.training.masters.own_all()

    def close(self, *, state: bool) -> None:
        self.training.give_back(self.training.members, sharded=False)


class Single(External):
    """One rank: what the other strategies are measured against, and must agree with."""

    name = "single"
