"""The pushes of a step where the node is the unit: buckets are reduced in the node's memory, then their shards travel.

    all ranks     agree that a step's gradients begin to leave                            one small exchange for a step
    node          local rank l reduces shard l out of its node's memories                 (window)
    across        the ranks with local rank l allreduce shard l, all l at a time          (any algorithm)

Under ps the second level is another one (:mod:`.server_pushes`).

The ranks of a node meet once for all buckets that each of them has packed by then, not once for each bucket: every rank
says with its arrival how many it has, and the least of these numbers is what all of them reduce. Where nothing computes
between the buckets, or a rank waits for a slower one, a step has one such meeting. A bucket's second half begins when
its first has ended, and overlaps the first half of the next ones: each level has a queue of its own, in the order of
the buckets on all ranks. Nothing leaves before all ranks are known to be in backward, so that a rank that does
something else instead is named on all of them, and nobody waits for it.

A meeting has no end of its own: a rank may go on while others still read its buckets. Their memory is written again
when the next step packs, and by then all ranks have met once more (:meth:`Pushes.settle`).
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar, Final

import torch

from ..chunks import Range
from ..collectives.allreduce import allreduce_async
from ..errors import CommlabError
from ..gradients.bucket import Bucket
from ..native.dtypes import HALVES, WIRES
from ..runtime.agreement import Signature
from ..runtime.control import exchange_records
from ..runtime.ending import HARMLESS
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..schedules.step import NodeStep
from ..transport.base import Pending
from ..window import loops
from ..window.area import NOWHERE, Place
from ..window.exchange import Attachment
from .holders import Levels
from .owners import all_owners

_WIRE_OF: Final = {dtype: name for name, dtype in WIRES.items()}


class _Shard:
    """This rank's shard of a bucket: how it is reduced out of the memory of all ranks of the node. ``sources``: of each
    local rank, where its bucket lies. ``target``: where the shard is written; None: to fp32 numbers of its own."""

    def __init__(self, node: Group, bucket: Bucket, own: Range, sources: Sequence[Place], target: torch.Tensor | None):
        self._node, self._bucket, self._own, self._sources, self._target = node, bucket, own, sources, target
        flat = bucket.flat
        self.signature = Signature(
            "reduce_scatter", tuple(flat.shape), flat.dtype, bucket.name, "mean, and what follows"
        )

    def reduce(self) -> torch.Tensor:
        """The shard of the node's mean: the target, or fp32 sums that were never rounded."""
        window, own, shard = self._node.window, self._own, self._target
        assert window is not None
        if shard is None:
            shard = torch.empty(own.numel, dtype=torch.float32, device="cpu")
        self._node.account(loops.reduce_at(window, self._sources, self._bucket.dtype, own, shard, self._node.size))
        return shard


class Push:
    """A bucket on its way: a :class:`commlab.gradients.hooks.Waitable`."""

    def __init__(self, step: _StepPushes, bucket: Bucket):
        self._step, self.bucket = step, bucket
        self._exchange: Handle | None = None
        """With the other nodes."""
        self._ended = False

    @property
    def result(self) -> torch.Tensor:
        """This rank's shard of the mean over all ranks, once :meth:`wait` has returned: a view of the bucket, or for 16
        bits fp32; empty where another node has it."""
        assert self._exchange is not None
        found: torch.Tensor = self._exchange.result
        return found

    def wait(self, timeout_s: float | None = None) -> torch.Tensor:
        """Return :attr:`result` once it is there; raise what went wrong."""
        self._step.reduce_all(timeout_s)
        assert self._exchange is not None
        found: torch.Tensor = self._exchange.wait(timeout_s)
        if not self._ended:
            self._ended = True
            self._step.pushes.arrived(self.bucket, found)
        return found

    def exchange(self, shard: torch.Tensor) -> None:
        """The node's part is done: let the other nodes have ``shard``."""
        self._exchange = self._step.pushes.exchange(shard, self.bucket)

    def refuse(self, error: Exception, timeout_s: float | None) -> None:
        """The other nodes wait for this one, and have not seen what went wrong here: tell them."""
        if self._exchange is None:
            pushes = self._step.pushes
            self._exchange = pushes.across.refuse(pushes.KIND, self.bucket.name, error)
        with suppress(CommlabError):  # they must hear of it before this rank goes its way
            self._exchange.wait(timeout_s)


class _StepPushes:
    """The pushes of one step. ``gate``: ends once all ranks are known to push."""

    def __init__(self, pushes: Pushes, gate: Handle):
        self.pushes, self._gate = pushes, gate
        self._made: list[Push] = []
        self._reduced = 0
        """So many of them have gone through the node's memory, and are on their way to the other nodes."""
        self._meeting: Handle | None = None
        """Of the ranks of the node, for the pushes from there on."""
        self._failed: Exception | None = None
        self._lock = threading.RLock()  # a meeting may end while it is being submitted
        gate.when_finished(lambda _: self._go_on())

    @property
    def count(self) -> int:
        """How many pushes were made."""
        return len(self._made)

    def add(self, push: Push) -> None:
        with self._lock:
            self._made.append(push)
            if self._gate.finished:
                self._go_on()

    def _go_on(self) -> None:
        """Meet the ranks of the node for what this rank has made since they last met."""
        with self._lock:
            while self._gate.error is None and self._failed is None and self._reduced < len(self._made):
                if self._meeting is not None and not self._meeting.finished:
                    return
                try:
                    if self._meeting is None:
                        signature = self.pushes.shards[self._reduced].signature
                        self._meeting = self.pushes.node.submit(signature, self._meet(), attached=self._attach)
                        self._meeting.when_finished(lambda _: self._go_on())
                    elif self._meeting.error is not None:
                        return  # for whoever waits
                    else:
                        self._meeting = None
                except Exception as error:  # for whoever waits, and not for whoever has moved the gate on
                    self._failed = error

    def _attach(self) -> Attachment:
        return Attachment(NOWHERE, len(self._made))

    def _meet(self) -> Pending:
        """Reduce what all ranks of the node have packed, and send it on."""
        window = self.pushes.node.window
        assert window is not None
        packed = min(count for _, count in window.sync.places())
        try:
            while self._reduced < packed:
                push, shard = self._made[self._reduced], self.pushes.shards[self._reduced]
                push.exchange(shard.reduce())
                self._reduced += 1
        except Exception as error:  # of the other level, whose end does not end this one
            self._failed = error
        yield from ()  # there is nothing to wait for

    def reduce_all(self, timeout_s: float | None) -> None:
        """Wait until all pushes have gone through the node's memory: what other nodes wait for comes first."""
        if self._reduced < len(self._made):
            self._gate.wait(timeout_s)
        while self._reduced < len(self._made):
            self._go_on()  # another thread may have ended the gate or a meeting, and not come to this yet
            if self._failed is not None:
                raise self._failed
            meeting = self._meeting
            if meeting is None:
                continue
            try:
                meeting.wait(timeout_s)
            except HARMLESS as error:
                self._made[self._reduced].refuse(error, timeout_s)
                raise


class Pushes:
    """The pushes of the ranks of ``group``, step by step, and what follows them. ``levels``: groups that nothing else
    uses (:func:`commlab.runtime.nodes.open_levels`). ``algorithm`` moves shards between nodes."""

    EVERY_NODE_UPDATES: ClassVar[bool] = True
    """Whether every node updates all parameters, alike; else rank 0 does."""
    KIND: ClassVar[str] = "allreduce"
    """Of the exchange between the nodes, for the agreement check."""

    def __init__(self, group: Group, levels: Levels, algorithm: str):
        self.group, self.algorithm = group, algorithm
        self.node, self.across = levels
        self.chunks: list[tuple[Range, ...]] = []
        """Of each bucket: the shards of the local ranks."""
        self.memory: list[torch.Tensor] = []
        """What lies for the pushes in this rank's area of the window, beside the buckets."""
        self.shards: list[_Shard] = []
        """This rank's shards of the buckets, in their order."""
        self._step: _StepPushes | None = None
        self._settled = True
        """Whether no rank reads any bucket."""
        self._given_up = False
        """Whether the last step was not pushed to its end."""
        self._counted = dict.fromkeys(levels, (0, 0, 0, 0))
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

    def exchange(self, shard: torch.Tensor, bucket: Bucket) -> Handle:
        """Let the other nodes have this rank's ``shard`` of the node's mean of ``bucket``."""
        wire = _WIRE_OF.get(bucket.dtype)
        return allreduce_async(shard, "mean", bucket.name, self.algorithm, wire, self.across)

    def arrived(self, bucket: Bucket, shard: torch.Tensor) -> None:
        """This rank's wait for its ``shard`` of the mean over all ranks has ended."""
        self.count()

    def owned(self, bucket: Bucket, shard: torch.Tensor) -> torch.Tensor:
        """What this rank updates by, of ``bucket``, once all ranks have met after their waits."""
        return shard

    def pull(self, hosts: Sequence[torch.Tensor]) -> None:
        """The owners have updated: let every rank have the new parameters, which lie in ``hosts``, memory of the
        window. Collective."""
        self.node.barrier()
        self._settled = True  # all ranks of the node have waited for their pushes

    def targets(self, buckets: Sequence[Bucket], firsts: Sequence[Place]) -> list[torch.Tensor | None]:
        """Of each bucket: where this rank writes its shard of the node's mean (:class:`_Shard`). ``firsts``: where
        local rank 0 has the buckets. Collective."""
        own = [chunks[self.node.rank] for chunks in self.chunks]
        return [
            None if bucket.dtype in HALVES else bucket.flat[mine.start : mine.stop]
            for bucket, mine in zip(buckets, own, strict=True)
        ]

    def plan(self, buckets: Sequence[Bucket]) -> None:
        """From the next step on there are these buckets. Collective."""
        self._look_back()
        node, window = self.node, self.node.window
        assert window is not None
        own = [window.locate(bucket.flat) or Place(NOWHERE, 0) for bucket in buckets]
        packed = b"".join(struct.pack("<QQ", *place) for place in own)
        rows = [list(struct.iter_unpack("<QQ", row)) for row in exchange_records(node, packed, "places of the buckets")]
        self.chunks = [all_owners(bucket.numel, node.size) for bucket in buckets]
        targets = self.targets(buckets, [Place(*place) for place in rows[0]])
        self._step, self.shards = (
            None,
            [
                _Shard(node, bucket, chunks[node.rank], [Place(*row[at]) for row in rows], target)
                for at, (bucket, chunks, target) in enumerate(zip(buckets, self.chunks, targets, strict=True))
            ],
        )

    def settle(self) -> None:
        """Before gradients are packed: wait until no rank reads what the last step has packed. Where that step was made
        to its end, all ranks have met since (:meth:`pull`), and nothing is to be done. Collective. DisagreementError
        where this rank has given the last step up, and others have not."""
        self._look_back()
        settled, self._step, self._settled = self._settled, None, True
        if self._given_up:
            self._tell_given_up()
        elif not settled:
            self.group.barrier()

    def _look_back(self) -> None:
        self._given_up |= self._step is not None and self._step.count < len(self.shards)

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

    def launch(self, bucket: Bucket) -> Push:
        """Start to push a packed bucket. Collective, in the order of the buckets, which begins anew with
        :meth:`settle`."""
        if self._step is None:
            flat = bucket.flat
            signature = Signature("reduce_scatter", tuple(flat.shape), flat.dtype, bucket.name, "mean, nodes first")
            self._step, self._settled = _StepPushes(self, self.group.submit(signature)), False
        push = Push(self._step, bucket)
        self._step.add(push)
        return push
