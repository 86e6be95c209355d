"""Leaders: an allreduce of some hundred KB on several nodes, as one native call of those who wait for it
(:mod:`commlab.runtime.leaders`). It is what hierarchical does, with the same bits and fewer meetings:

    1  on each node    members copy their numbers into the window; the leader adds the node's numbers up there
    2  between nodes   two leaders exchange their sums and both add them; more of them exchange shares, as by direct
    3  on each node    everyone copies the result out of the window

Cost for n elements, N nodes of L ranks: a leader reads L n elements, sends n where N is 2, else 2 n (N-1)/N, and the
other ranks read and write n and send nothing; two waits on each node and one or two message times. hierarchical
announces the operation to everyone first, waits three times on each node and sends between nodes in two phases, but all
ranks of a node add up and send. So the leaders are the faster ones only where there is little to do:
:data:`commlab.runtime.leaders.AREAS_BYTES`. Rounding: that of hierarchical, whose shards and owners say in which order
each number is added.
"""

from __future__ import annotations

from array import array
from functools import partial
from typing import Any, NamedTuple

import torch

from ...chunks import Range, adjoining
from ...native.dtypes import DTYPES, HALVES, OP_CODES
from ...native.library import built
from ...runtime.group import Group
from ...schedules import ALGORITHMS
from ...transport.base import AtOnce, Counts, Pending
from ...window.exchange import NOTHING, Attachment
from ..plan import divided
from . import hierarchical

CASTS = hierarchical.CASTS
attach = hierarchical.attach
allreduce = hierarchical.allreduce


class DealtPiece(NamedTuple):
    """Numbers that one node owns between the nodes."""

    start: int
    """In the tensor."""
    at: int
    """Among the sums, which stand owner by owner."""
    numel: int


class Dealt(NamedTuple):
    """How the numbers of a tensor are dealt out between the leaders."""

    pieces: tuple[DealtPiece, ...]
    shares: tuple[Range, ...]
    """Of each leader, among the sums."""
    to_each: bool
    """Whether each leader gets its share alone and sends it back reduced; otherwise both get all and add all."""

    def native(self, itemsize: int) -> Any:
        """The same as native code reads it."""
        assert built is not None
        bounds = [0, *(share.stop for share in self.shares)]
        pieces = [number for piece in self.pieces for number in piece]
        return built.LinksShares(array("Q", pieces).tobytes(), array("Q", bounds).tobytes(), itemsize, self.to_each)

    def sent(self, leader: int, itemsize: int) -> tuple[int, int]:
        """The bytes and the messages that this leader sends."""
        assert built is not None
        first, frame = built.LINKS_FIRST_BYTES, built.LINKS_FRAME_BYTES
        others = [share.numel * itemsize for at, share in enumerate(self.shares) if at != leader]
        own = self.shares[leader].numel * itemsize
        if not self.to_each:
            others = [own + other for other in others]
        size_bytes = sum(others) + own * len(others) * self.to_each
        messages = sum(1 + -(-max(0, size - first) // frame) for size in others)
        return size_bytes, messages + -(-own // frame) * len(others) * self.to_each


def deal(numel: int, nodes: int, node_size: int, itemsize: int) -> Dealt:
    """The numbers that each node owns by hierarchical, where direct runs between the nodes."""
    owners = ALGORITHMS["direct"].owners
    owned: list[list[Range]] = [[] for _ in range(nodes)]
    for shard in hierarchical.shards(numel, node_size, itemsize):
        for ranges, chunk in zip(owned, owners(shard.numel, nodes), strict=True):
            ranges.append(Range(shard.start + chunk.start, shard.start + chunk.stop))
    pieces, at = [], 0
    for ranges in owned:
        for each in ranges:
            if each.numel:
                pieces.append(DealtPiece(each.start, at, each.numel))
            at += each.numel
    shares = adjoining(sum(each.numel for each in ranges) for ranges in owned)
    return Dealt(tuple(pieces), shares, to_each=nodes > 2)


def load_of(group: Group, numel: int, wire: torch.dtype, op: str) -> Dealt | None:
    """How an allreduce of ``numel`` numbers of ``wire`` is dealt out; None where hierarchical is the faster one, or
    runs another algorithm than direct between the nodes, which adds in another order."""
    leaders, itemsize = group.leaders, wire.itemsize
    if leaders is None or not 0 < numel * itemsize <= leaders.area_bytes:
        return None
    shards = hierarchical.shards(numel, leaders.node_size, itemsize)
    for shard in shards:
        if hierarchical.algorithm_between(group, shard.numel * itemsize, wire in HALVES) != "direct":
            return None
    return deal(numel, leaders.nodes, leaders.node_size, itemsize)


def at_once(group: Group, few: Dealt, numel: int, wire: torch.dtype, op: str) -> AtOnce:
    """The native call of the leaders."""
    leaders = group.leaders
    assert leaders is not None
    divisor, reduction = divided(op, group.size)
    arguments = numel, DTYPES[wire][0], OP_CODES[reduction], divisor, few.native(wire.itemsize)
    size_bytes = numel * wire.itemsize
    mine = group.nodes.index(group.topology.node_of(group.rank))
    sent = few.sent(mine, wire.itemsize) if leaders.leads else (0, 0)
    counts = Counts(*sent, size_bytes * (leaders.node_size - 1 if leaders.leads else 1), size_bytes)
    resume = partial(leaders.resume, counts, partial(_long_way, reduction, divisor))
    return AtOnce(leaders.call_with_shares, arguments, resume, {0: counts})


def _long_way(op: str, divisor: float, group: Group, tensor: torch.Tensor) -> tuple[Pending, Attachment]:
    return hierarchical.reduce(group, tensor.detach().view(-1), op, divisor), NOTHING
