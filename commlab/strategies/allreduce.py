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
from ..gradients.hooks import Waitable
from ..runtime.group import Group
from .changes import Roster
from .options import Options
from .protocol import Strategy
from .start import close_buckets, start, start_buckets
from .verdict import Verdict, agree


class AllReduce(Strategy):
    """After the exchange ``p.grad`` is a view of its bucket (no copy), or the unpacked gradient where the wire has
    another dtype or the parameter is not contiguous."""

    name = "allreduce"

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        self.training = training = start(model, optimizer, group, options)
        self.buckets = start_buckets(training, self.launch, keep_gradients=True)
        training.masters.own_all()

    def backward(self, loss: torch.Tensor | None) -> None:
        if loss is not None:
            loss.backward()

    def launch(self, bucket: Bucket) -> Waitable:
        training = self.training
        plan = plan_of(training.group, "allreduce", bucket.flat, "mean", bucket.name, training.options.algorithm)
        squares = bucket.squares if training.wants_norm else None
        return start_allreduce(training.group, bucket.flat, "mean", plan, squares=squares)

    def agree(self) -> Verdict:
        group, squares = self.training.group, 0.0
        if self.training.wants_norm:
            # Each rank adds up an equal range of every bucket; all of them have all numbers.
            for bucket, _ in self.buckets.launched:
                own = split(bucket.numel, group.size)[group.rank]
                squares += bucket.squares.of(bucket.flat[own.start : own.stop])
        buckets = self.buckets
        return agree(group, squares, buckets.finite, buckets.used, len(self.training.parameters))

    def update(self, factor: float, unused: set[int]) -> None:
        for bucket, _ in self.buckets.launched:
            copied: list[torch.Tensor | None] = []
            flat = bucket.result()
            for member, gradient in zip(bucket.parameters, bucket.gradients(flat), strict=True):
                tensor = member.tensor
                copied.append(None)
                if member.index in unused:
                    tensor.grad = None
                elif bucket.dtype == tensor.dtype and tensor.is_contiguous():
                    tensor.grad = gradient
                else:
                    # Strides as the parameter's own: torch's fused optimizers walk both as plain memory.
                    copied[-1] = tensor.grad = torch.empty_like(tensor)
            bucket.packer.unpack(flat, copied)
        # Multiplied in the parameters' precision: a 16-bit bucket must not be rounded a second time.
        self.training.masters.step(factor)

    def replan(self, roster: Roster) -> None:
        self.training.give_back(roster.members, sharded=False)
        close_buckets(self.training, self.buckets)
        self.training.replan(roster)
        self.buckets = start_buckets(self.training, self.launch, keep_gradients=True)
        self.training.masters.own_all()

    def close(self, *, state: bool) -> None:
        self.training.give_back(self.training.members, sharded=False)
        close_buckets(self.training, self.buckets)
