"""The pushes of a step where the node is the unit: each bucket is reduced in the node's memory, then its shards travel.

    all ranks     agree that a step's gradients begin to leave                            one small exchange for a step
    node          local rank l reduces shard l out of its node's memories                 (window)
    across        the ranks with local rank l allreduce shard l, all l at a time          (any algorithm)

A bucket's second half begins when its first has ended, and overlaps the first half of the next bucket: each level has a
queue of its own, in the order of the buckets on all ranks. Nothing leaves before all ranks are known to be in backward,
so that a rank that does something else instead is named on all of them, and nobody waits for it.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Final

import torch

from ..chunks import Range
from ..collectives.allreduce import allreduce_async
from ..collectives.halves import reduce_chunks_async
from ..errors import CommlabError
from ..gradients.bucket import Bucket
from ..native.dtypes import WIRES
from ..runtime.agreement import Signature
from ..runtime.ending import HARMLESS
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..schedules.step import NodeStep

_WIRE_OF: Final = {dtype: name for name, dtype in WIRES.items()}


class Push:
    """A bucket on its way: a :class:`commlab.gradients.hooks.Waitable`."""

    def __init__(self, step: _StepPushes, bucket: Bucket, chunks: tuple[Range, ...]):
        self._step, self._bucket, self._chunks = step, bucket, chunks
        self._reduction: Handle | None = None
        """In the node."""
        self._exchange: Handle | None = None
        """With the other nodes."""
        self._failed: Exception | None = None
        self._lock = threading.Lock()

    @property
    def result(self) -> torch.Tensor:
        """This rank's shard of the mean over all ranks, once :meth:`wait` has returned: a view of the bucket, or for 16
        bits fp32."""
        assert self._exchange is not None
        found: torch.Tensor = self._exchange.result
        return found

    def wait(self, timeout_s: float | None = None) -> torch.Tensor:
        """Return :attr:`result` once it is there; raise what went wrong."""
        self._step.reduce_all(timeout_s)
        if self._exchange is None:
            assert self._failed is not None
            raise self._failed
        found: torch.Tensor = self._exchange.wait(timeout_s)
        self._step.pushes.count()
        return found

    def begin(self) -> None:
        """All ranks are known to push."""
        bucket, node = self._bucket, self._step.pushes.node
        self._reduction = reduce_chunks_async(bucket.flat, self._chunks, "mean", bucket.name, group=node)
        self._reduction.when_finished(self._reduced)

    def reduce(self, timeout_s: float | None) -> None:
        """Wait for the node's part, and let the other nodes have it."""
        assert self._reduction is not None
        try:
            self._reduction.wait(timeout_s)
        except HARMLESS:
            self._reduced(self._reduction)
            if self._exchange is not None:
                with suppress(CommlabError):  # the other nodes must hear of it before this rank goes its way
                    self._exchange.wait(timeout_s)
            raise
        self._reduced(self._reduction)

    def _reduced(self, reduction: Handle) -> None:
        with self._lock:  # another thread may end the reduction that this one waits for
            if self._exchange is not None or self._failed is not None:
                return
            pushes, wire, error = self._step.pushes, _WIRE_OF.get(self._bucket.dtype), reduction.error
            try:
                if isinstance(error, HARMLESS):
                    # The other nodes wait for this one, and have not seen what went wrong here.
                    self._exchange = pushes.across.refuse("allreduce", self._bucket.name, error)
                elif error is None:
                    self._exchange = allreduce_async(
                        reduction.result, "mean", self._bucket.name, pushes.algorithm, wire, pushes.across
                    )
            except Exception as error:  # for whoever waits, and not for whoever has moved the reduction on
                self._failed = error


class _StepPushes:
    """The pushes of one step. ``gate``: ends once all ranks are known to push."""

    def __init__(self, pushes: Pushes, gate: Handle):
        self.pushes, self._gate = pushes, gate
        self._made: list[Push] = []
        self._begun = 0
        """So many of them have begun."""
        self._failed: Exception | None = None
        self._lock = threading.Lock()
        gate.when_finished(self._opened)

    @property
    def count(self) -> int:
        """How many pushes were made."""
        return len(self._made)

    def add(self, push: Push) -> None:
        with self._lock:
            self._made.append(push)
            if self._gate.finished:
                self._begin()

    def _opened(self, _: Handle) -> None:
        with self._lock:
            self._begin()

    def _begin(self) -> None:
        if self._gate.error is not None:
            return
        while self._begun < len(self._made) and self._failed is None:
            try:
                self._made[self._begun].begin()
            except Exception as error:  # for whoever waits, and not for whoever has moved the gate on
                self._failed = error
            self._begun += 1

    def reduce_all(self, timeout_s: float | None) -> None:
        """Wait until all pushes have gone through the node's memory: what other nodes wait for comes first."""
        self._gate.wait(timeout_s)
        self._opened(self._gate)  # another thread may have ended the gate, and not come to this yet
        if self._failed is not None:
            raise self._failed
        for push in self._made:
            push.reduce(timeout_s)


class Pushes:
    """The pushes of the ranks of ``group``, step by step. ``node``, ``across``: groups that nothing else uses
    (:func:`commlab.runtime.nodes.open_levels`). ``algorithm`` moves shards between nodes."""

    def __init__(self, group: Group, node: Group, across: Group, algorithm: str):
        self.group, self.node, self.across, self.algorithm = group, node, across, algorithm
        self._step: _StepPushes | None = None
        self._buckets = 0
        self._given_up = False
        """Whether the last step was not pushed to its end."""
        self._counted = dict.fromkeys((node, across), (0, 0, 0, 0))
        """What was counted of each level."""

    def count(self) -> None:
        """Count in the group what both levels have sent and moved."""
        for level, before in self._counted.items():
            now = level.bytes_sent, level.messages_sent, level.node_bytes_read, level.node_bytes_written
            if now != before:
                self._counted[level] = now
                sent, messages, read, written = (value - old for value, old in zip(now, before, strict=True))
                self.group.bytes_sent += sent
                self.group.messages_sent += messages
                self.group.account(NodeStep("push", read, written))

    def plan(self, buckets: int) -> None:
        """From the next step on there are so many buckets."""
        self._look_back()
        self._step, self._buckets = None, buckets

    def _look_back(self) -> None:
        self._given_up |= self._step is not None and self._step.count < self._buckets

    def _tell_given_up(self) -> None:
        """Ranks that have not given up the last step still wait for the rest of it, and are told in its place.
        DisagreementError then, here too."""
        self._given_up = False
        told = Signature("barrier", name="a backward pass was given up")
        errors = []
        for handle in [level.submit(told) for level in (self.node, self.across)]:
            try:
                handle.wait()
            except CommlabError as error:  # the other level's ranks must hear of it, too
                errors.append(error)
        if errors:
            raise errors[0]

    def launch(self, bucket: Bucket, chunks: tuple[Range, ...]) -> Push:
        """Start to push a packed bucket; ``chunks``: the shards, one for each local rank. Collective, in the order of
        the buckets, which begins anew in each step."""
        if self._step is None or bucket.index == 0:
            self._look_back()
            if self._given_up:
                self._tell_given_up()
            flat = bucket.flat
            signature = Signature("reduce_scatter", tuple(flat.shape), flat.dtype, bucket.name, "mean, nodes first")
            self._step = _StepPushes(self, self.group.submit(signature))
        push = Push(self._step, bucket, chunks)
        self._step.add(push)
        return push
