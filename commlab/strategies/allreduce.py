"""``allreduce``: every rank gets the mean gradient and makes the same update. Any algorithm of the table moves the
buckets.

    backward | pack b0 -> allreduce b0 ...| pack b1 -> allreduce b1 ... | norm | clip | optimizer on all ranks

Cost per step: one allreduce of the gradient, 2 n (P-1)/P numbers sent per rank; the optimizer's state exists P times.
A. Sergeev, M. Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow", arXiv 1802.05799; S. Li et
al., "PyTorch distributed", VLDB 2020 (buckets and overlap).
"""

from __future__ import annotations

import torch

from ..chunks import split
from ..collectives.allreduce import start_allreduce
from ..collectives.plan import plan_of
from ..gradients.bucket import Bucket
from ..native.norm import scale_
from .engine import Strategy


class AllReduce(Strategy):
    """After the exchange ``p.grad`` is a view of its bucket (no copy), or the unpacked gradient where the wire has
    another dtype or the parameter is not contiguous."""

    name = "allreduce"

    def _launch(self, bucket: Bucket) -> None:
        plan = plan_of(self.group, "allreduce", bucket.flat, "mean", bucket.name, self.options.algorithm)
        handle = start_allreduce(self.group, bucket.flat, "mean", plan, squares=self._squares(bucket))
        self._launched.append((bucket, handle))

    def _owned_squares(self) -> float:
        squares = 0.0
        for bucket, _ in self._launched:
            own = split(bucket.numel, self.group.size)[self.group.rank]
            squares += bucket.squares.of(bucket.flat[own.start : own.stop])
        return squares

    def _update(self, clip: float, unused: set[int]) -> None:
        for bucket, _ in self._launched:
            copied: list[torch.Tensor | None] = []
            flat = bucket.result()
            for member, place in zip(bucket.parameters, bucket.ranges, strict=True):
                tensor = member.tensor
                copied.append(None)
                if member.index in unused:
                    tensor.grad = None
                elif bucket.dtype == tensor.dtype and tensor.is_contiguous():
                    tensor.grad = flat[place.start : place.stop].view(tensor.shape)
                else:
                    # Strides as the parameter's own: torch's fused optimizers walk both as plain memory.
                    copied[-1] = tensor.grad = torch.empty_like(tensor)
            bucket.packer.unpack(flat, copied)
            if self.masters is not None:
                continue
            # In the parameters' precision: a 16-bit bucket must not be rounded a second time.
            gradients = [member.tensor.grad for member in bucket.parameters]
            scale_([gradient for gradient in gradients if gradient is not None], clip)
        if self.masters is not None:
            used = [item for item in self.parameters if item.tensor.grad is not None]
            masters = [self.masters.whole[item.index] for item in used]
            self.masters.unscale([item.tensor.grad for item in used if item.tensor.grad is not None], masters, clip)
            self._update_masters(1.0)
            return
        self.optimizer.step()
