"""``allreduce``: every rank gets the mean gradient and makes the same update. Any algorithm of the table moves the
buckets.

    backward | pack b0 -> allreduce b0 ...| pack b1 -> allreduce b1 ... | norm | clip | optimizer on all ranks

Cost per step: one allreduce of the gradient, 2 n (P-1)/P numbers sent per rank; the optimizer's state exists P times.
A. Sergeev, M. Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow", arXiv 1802.05799; S. Li et
al., "PyTorch distributed", VLDB 2020 (buckets and overlap).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import trace
from ..chunks import split
from ..collectives.allreduce import start_allreduce
from ..collectives.plan import plan_of
from ..gradients.bucket import Bucket
from ..gradients.hooks import Waitable
from ..gradients.parameters import NamedParameter
from ..native.norm import norm_squared
from ..runtime.group import Group
from .changes import Roster
from .edits import Edits, Probe
from .options import Options
from .protocol import Strategy
from .reduced import ReducedGradient, whole_gradients
from .start import close_buckets, start, start_buckets
from .verdict import Verdict, unused_on_all


class AllReduce(Strategy):
    """After backward ``p.grad`` is the reduced gradient: its range of the bucket (no copy), or unpacked where the wire
    has another dtype or the parameter is not contiguous. Between backward and step the user may edit it."""

    name = "allreduce"

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        self.training = start(model, optimizer, group, options)
        if group.node is not None and options.algorithm in ("auto", "hierarchical"):
            self.training.window = group.node.window  # what is reduced on each node is reduced where it lies
        self._plan()

    def _plan(self) -> None:
        """Cut what is trained into buckets."""
        training, group = self.training, self.training.group
        self.buckets = start_buckets(training, self.launch, keep_gradients=True)
        training.masters.own_all()
        self.edits = Edits(group, training.parameters, instead=training.masters.instead)
        self._probes = [Probe(bucket.flat) for bucket in self.buckets.buckets if bucket.mirror is None and bucket.numel]
        """Of the gradients that lie in their buckets: writes through ``p.grad.data``."""

    def launch(self, bucket: Bucket) -> Waitable:
        training = self.training
        plan = plan_of(training.group, "allreduce", bucket.flat, "mean", bucket.name, training.options.algorithm)
        squares = bucket.squares if training.wants_norm else None
        return start_allreduce(training.group, bucket.flat, "mean", plan, squares=squares)

    def complete(self) -> None:
        # Nothing could hide behind what comes between backward and step, and there p.grad may be edited.
        with trace.span("exchange"):
            self.buckets.wait()
        for bucket, _ in self.buckets.launched:
            copied: list[torch.Tensor | None] = []
            flat = bucket.result()
            for member, gradient in zip(bucket.parameters, bucket.gradients(flat), strict=True):
                tensor = member.tensor
                copied.append(None)
                if bucket.dtype == tensor.dtype and tensor.is_contiguous():
                    tensor.grad = gradient
                else:
                    # Strides as the parameter's own: torch's fused optimizers walk both as plain memory.
                    copied[-1] = tensor.grad = torch.empty_like(tensor)
            bucket.packer.unpack(flat, copied)
        self.edits.note_gradients()
        for probe in self._probes:
            probe.note()

    def reduced(self, scale: float) -> tuple[list[ReducedGradient], set[int]]:
        training = self.training
        unused = unused_on_all(training.group, self.buckets.used, len(training.parameters))
        self._pass_over(unused)
        return whole_gradients(training, scale), unused

    def _pass_over(self, unused: set[int]) -> None:
        """Let the optimizer pass over parameters without a gradient on any rank, as it does where nobody has put zeros
        there. What the user has added to these zeros counts."""
        for index in unused:
            tensor = self.training.parameters[index].tensor
            if tensor.grad is not None and not tensor.grad.any():
                tensor.grad = None
                self.edits.note_gradient(index)

    def forget(self) -> None:
        self.edits.forget_gradients()

    def agree(self) -> Verdict:
        training, buckets, edits = self.training, self.buckets, self.edits
        group, squares, finite = training.group, 0.0, buckets.finite
        edited: Sequence[NamedParameter] = edits.edited_gradients()
        if not edited and any(probe.changed() for probe in self._probes):
            edited = [item for item in training.parameters if item.tensor.grad is not None]
        if edited:
            # What the optimizer will see; each rank adds up an equal range of every gradient.
            for item in training.parameters:
                if item.tensor.grad is not None:
                    flat = item.tensor.grad.reshape(-1)
                    own = split(flat.numel(), group.size)[group.rank]
                    squares += norm_squared([flat[own.start : own.stop]])
            finite = math.isfinite(squares)
        elif training.wants_norm:
            # Each rank adds up an equal range of every bucket; all of them have all numbers.
            for bucket, _ in buckets.launched:
                own = split(bucket.numel, group.size)[group.rank]
                squares += bucket.squares.of(bucket.flat[own.start : own.stop])
        refusal = edits.refusal()
        verdict = training.record.agree(
            squares, finite, buckets.used, len(training.parameters), edits.digest(refusal, edited)
        )
        edits.require_alike(verdict.edits, refusal, edited)
        self._pass_over(verdict.unused)
        return verdict

    def update(self, factor: float, unused: set[int]) -> None:
        # Multiplied in the parameters' precision: a 16-bit bucket must not be rounded a second time.
        self.training.masters.step(factor)

    def replan(self, roster: Roster) -> None:
        self.training.give_back(roster.members, sharded=False)
        close_buckets(self.training, self.buckets)
        self.training.replan(roster)
        self._plan()

    def close(self, *, state: bool) -> None:
        self.training.give_back(self.training.members, sharded=False)
        close_buckets(self.training, self.buckets)
