"""What ``single``, ``ddp`` and ``horovod`` share: commlab moves nothing, ``p.grad`` is complete when backward and
whoever reduces it are done."""

from __future__ import annotations

import math

import torch

from ..gradients.hooks import GradientBuckets
from ..native.norm import norm_squared, scale_
from .engine import Strategy
from .verdict import Agreement


class Local(Strategy):
    """Scale by the count, norm, clip and step on whole gradients."""

    def _make_buckets(self) -> GradientBuckets | None:
        return None

    def _gradients(self) -> list[torch.Tensor]:
        return [item.tensor.grad for item in self.parameters if item.tensor.grad is not None]

    def _agree(self) -> Agreement:
        gradients = self._gradients()
        scale_(gradients, self._local_scale())
        scaled = self.precision.loss_scale is not None
        # Whoever reduced them spread an inf or NaN to all ranks, so all of them see the same here.
        squares = norm_squared(gradients) if scaled or self.options.max_grad_norm is not None else 0.0
        return Agreement(squares, math.isfinite(squares) and self._unscale(), set())

    def _unscale(self) -> bool:
        if self.masters is None:
            return True
        gradients = self._gradients()
        masters = [self.masters.whole[item.index] for item in self.parameters if item.tensor.grad is not None]
        for master in self.masters.whole.values():
            master.grad = None  # left by a step that was skipped
        return self.masters.unscale(gradients, masters, 1.0 / self.precision.scale)

    def _update(self, clip: float, unused: set[int]) -> None:
        if self.masters is not None:
            self._update_masters(clip * self.precision.scale)
            return
        scale_(self._gradients(), clip)
        self.optimizer.step()
