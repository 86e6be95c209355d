"""Hierarchical: what can be done in memory is done in memory; between nodes, every rank carries its own shard.

    1  on each node    local rank l reduces shard l out of its node's memories          (window)
    2  between nodes   the ranks with local rank l allreduce shard l, all l at a time   (any schedule)
    3  on each node    every rank copies the others' shards                             (window)

So all ranks' cores reduce, and all their connections carry, and a number crosses the network as often as if a node were
one rank. Cost for n elements, N nodes of L ranks: each rank sends what the algorithm sends for n/L elements among N
ranks (ring: 2 n/L (N-1)/N); a node sends 2 n (N-1)/N. Rounding: all numbers of a node are added in rank order and
divided by P before the first rounding; then as the algorithm between nodes says. When to use: several nodes with
equally many ranks, more than one, each. It is composed of what exists and adds no loop of its own.
"""

from __future__ import annotations

import torch

from ...errors import UsageError
from ...runtime.execute import Execution
from ...runtime.group import Group
from ...runtime.operand import Operand
from ...schedules import ALGORITHMS, compose
from ...transport.base import Pending
from ...window import loops
from ...window.exchange import Attachment
from ...window.memory import size_class
from ..select import Case, choose


def reason_against(group: Group) -> str:
    """Why this group can't; empty if it can."""
    if group.node is not None and group.across is not None:
        return ""
    return group.window_reason or "all ranks are on one node, where algorithm window needs no second level"


def allreduce(group: Group, flat: torch.Tensor, op: str, divisor: float) -> Pending:
    """Reduce ``flat`` (1-D, contiguous, CPU) in place."""
    node, across = group.node, group.across
    if node is None or across is None or node.window is None:
        raise UsageError(f"rank {group.rank}: algorithm hierarchical, but: {reason_against(group)}")
    shared, place, memory = flat, node.window.locate(flat), None
    if place is None:
        memory, place = node.window.allocate(size_class(flat.numel() * flat.element_size()))
        shared = memory.view(flat.dtype)[: flat.numel()]
        shared.copy_(flat)
    chunks = loops.aligned_split(flat.numel(), node.size, flat.element_size())
    own = chunks[node.rank]
    # The nodes' own exchange: it publishes the places, and nobody reads before everybody's data are there.
    node.window.sync.publish(0, *Attachment(*place))
    yield from loops.wait(node)
    shard = shared[own.start : own.stop]
    halves = shard.element_size() == 2
    # 16-bit sums are divided before they are rounded to travel, which keeps them in range; others once, at the end.
    yield from loops.reduce_chunks(node, shared, chunks, op, divisor if halves else 1, None, None)

    shard_bytes = shard.numel() * shard.element_size()
    case = Case("allreduce", across.size, shard_bytes, halves, group.transport.name, nodes=across.size)
    algorithm = ALGORITHMS[choose("auto", case, tuple(ALGORITHMS))[0]]
    owners = algorithm.owners(shard.numel(), across.size)
    meets_at_owner = halves and algorithm is ALGORITHMS["direct"]
    operand = Operand(shard, op, 1 if halves else divisor, own=owners[across.rank] if meets_at_owner else None)
    schedule = compose.allreduce(algorithm, across.rank, across.size, shard.numel())
    yield from group.execute(Execution(schedule, operand, across.transport))

    node.window.sync.publish(0, *Attachment(*place))
    yield from loops.wait(node)
    yield from loops.gather_chunks(node, shared, chunks)
    group.node_bytes_read, group.node_bytes_written = node.node_bytes_read, node.node_bytes_written
    if memory is not None:
        flat.copy_(shared)
        node.window.free(memory)
