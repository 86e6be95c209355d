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

from functools import partial

import torch

from ...chunks import Range
from ...errors import UsageError
from ...runtime import programs
from ...runtime.execute import Execution
from ...runtime.group import Group
from ...runtime.operand import Operand
from ...schedules import ALGORITHMS, compose
from ...transport.base import Pending
from ...window import loops
from ...window.exchange import NOTHING, Attachment
from ...window.memory import size_class
from ..plan import Call
from ..select import Conditions, choose

CASTS = False


def reason_against(group: Group, kind: str) -> str:
    """Empty for an allreduce of a group of several nodes, each of which has a window."""
    if kind != "allreduce":
        return f"hierarchical is for allreduce, not for {kind}; use auto"
    if group.node is not None and group.across is not None:
        return ""
    return group.window_reason or "all ranks are on one node, where algorithm window needs no second level"


def attach(call: Call) -> Attachment:
    """Nothing: each node makes an exchange of its own."""
    _ = call.flat  # a copy that can't be made is told before anything is sent
    return NOTHING


def allreduce(call: Call) -> Pending:
    """Reduce within each node, between the nodes, and share the result within each node."""
    return reduce(call.group, call.flat, call.op, call.divisor)


def shards(numel: int, node_size: int, itemsize: int) -> tuple[Range, ...]:
    """What each rank of a node carries between the nodes."""
    return loops.aligned_split(numel, node_size, itemsize)


def algorithm_between(group: Group, shard_bytes: int, halves: bool) -> str:
    """By which algorithm a shard is reduced between the nodes of ``group``. ``halves``: its numbers have 16 bits."""
    nodes = len(group.nodes)
    case = Conditions("allreduce", nodes, shard_bytes, halves, group.transport.name, nodes=nodes)
    return choose("auto", case, tuple(ALGORITHMS))[0]


def reduce(group: Group, flat: torch.Tensor, op: str, divisor: float) -> Pending:
    """The same of the flat buffer ``flat``."""
    node, across = group.node, group.across
    if node is None or across is None or node.window is None:
        raise UsageError(f"rank {group.rank}: algorithm hierarchical, but: {reason_against(group, 'allreduce')}")
    window = node.window
    shared, place, memory = flat, window.locate(flat), None
    if place is None:
        memory, place = window.allocate(size_class(flat.numel() * flat.element_size()))
        shared = memory.view(flat.dtype)[: flat.numel()]
        shared.copy_(flat)
    chunks = shards(flat.numel(), node.size, flat.element_size())
    own = chunks[node.rank]
    # The node's own exchange: it publishes the places, and nobody reads before everybody's data are there.
    window.sync.publish(0, *Attachment(*place))
    yield from loops.wait(window)
    shard = shared[own.start : own.stop]
    halves = shard.element_size() == 2
    # 16-bit sums are divided before they are rounded to travel, which keeps them in range; others once, at the end.
    first, last = (divisor, 1.0) if halves else (1.0, divisor)
    reduction = loops.Collective(window, "reduce", flat.dtype, flat.dtype, op, first, chunks)
    group.account((yield from reduction.run(shared)))
    yield from _across(group, across, shard, op, last)

    window.sync.publish(0, *Attachment(*place))
    yield from loops.wait(window)
    gathering = loops.Collective(window, "gather", flat.dtype, flat.dtype, "sum", 1, chunks)
    group.account((yield from gathering.run(shared)))
    if memory is not None:
        flat.copy_(shared)
        window.free(memory)


def _across(group: Group, across: Group, shard: torch.Tensor, op: str, divisor: float) -> Pending:
    """Allreduce this rank's shard with its counterparts on the other nodes."""
    halves = shard.element_size() == 2
    name = algorithm_between(group, shard.numel() * shard.element_size(), halves)
    algorithm = ALGORITHMS[name]
    owned = algorithm.owners(shard.numel(), across.size)[across.rank]
    schedule = partial(compose.allreduce, algorithm, across.rank, across.size, shard.numel())
    if across.transport.moves_itself:
        described = programs.native_operand(shard, op, divisor, algorithm.MEETS_AT_OWNER, owned)
        launch = programs.program_launch(across.transport, (name, "allreduce"), schedule, shard, described)
        yield from programs.finish(group, across.transport, launch)
        return
    operand = Operand(shard, op, divisor, own=owned if halves and algorithm.MEETS_AT_OWNER else None)
    yield from group.execute(Execution(schedule(), operand, across.transport))


def reduce_chunks(call: Call) -> Pending:
    """Refused by :func:`reason_against`."""
    raise UsageError(f"rank {call.group.rank}: {reason_against(call.group, 'reduce_scatter')}")


gather_chunks = reduce_chunks
