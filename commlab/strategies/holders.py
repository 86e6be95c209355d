"""Among whom parameters and the optimizer's state are cut into shards, where a job has several nodes of L ranks.

    dps   job     rank r of P owns n/P: gradients are reduced to their owners, and new parameters come back
    dps   node    local rank l owns n/L on every node: gradients alone travel, during backward
    ps    job     rank 0 owns all: every rank sends its gradient, and gets the new parameters
    ps    node    rank 0 owns all: every node sends the sum of its ranks once, and gets the new parameters once

``node`` has one copy of the parameters on a node. Under dps it sends as many bytes as ``job``, all of which can hide
behind backward, while ``job`` has the least state on each rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import UsageError
from ..runtime.control import gather_bytes, sides_of
from ..runtime.group import Group
from ..runtime.nodes import open_levels
from .options import Options

_INSTEAD = "shard='job' cuts parameters and state among all ranks, and shard='auto' takes what can be had"


class Levels(NamedTuple):
    """Groups of a strategy's own, where the node is the unit."""

    node: Group
    """The ranks of this rank's node, which share a window."""
    across: Group
    """The ranks with this one's local rank, one on each node."""


class Shards(NamedTuple):
    """Which unit was chosen."""

    levels: Levels | None
    """The groups by which numbers travel where the unit is the node; else None."""
    reason: str
    """What was chosen, and why; empty on one node, where there is nothing to choose."""


def require_node_memory(group: Group, options: Options) -> None:
    """UsageError where the node was asked for as the unit, and the ranks of a node can't share parameters."""
    reason = _reason_against(group, options) if options.shard == "node" else ""
    if reason:
        raise UsageError(f"shard='node' is not to be had: {reason}; {_INSTEAD}")


def choose(group: Group, options: Options, *, every_node_updates: bool) -> Shards:
    """The unit. ``every_node_updates``: where that is the node, each updates all parameters (dps); else one does (ps).
    Collective over ``group``, with equal options. UsageError on all ranks where the node was asked for, and its memory
    can't be had."""
    if len(group.nodes) == 1:
        return Shards(None, "")
    if options.shard == "job":
        return Shards(None, "job, as asked for")
    reason = _reason_against(group, options)
    if not reason and options.shard == "auto" and every_node_updates:
        reason = _different_processors(group)
    if reason:
        return Shards(None, f"job ({reason})")
    assert group.node is not None
    levels, reason = open_levels(group)
    if levels is None:
        if options.shard == "node":
            raise UsageError(f"rank {group.rank}: shard='node' is not to be had: {reason}; {_INSTEAD}")
        return Shards(None, f"job ({reason})")
    why = "as asked for" if options.shard == "node" else f"{len(group.nodes)} nodes share memory among their ranks"
    state = "and all of the optimizer's state" if every_node_updates else "and rank 0 all of the optimizer's state"
    return Shards(Levels(*levels), f"node ({why}): each has one copy of the parameters, {state}")


def _reason_against(group: Group, options: Options) -> str:
    """Why parameters can't live once on each node, as far as ``group`` tells; empty where they can. Not collective, and
    equal on all ranks."""
    if group.size == 1:
        return ""
    if len(group.nodes) == 1:
        if group.window is None:
            return f"its ranks share no memory: {group.window_reason}"
        return "" if options.algorithm in ("auto", "window") else f"algorithm {options.algorithm} shares no memory"
    if group.node is None:
        return group.window_reason
    if options.algorithm == "window":
        return f"algorithm window joins the ranks of one node, and these are on {len(group.nodes)}"
    if options.algorithm != "auto" and options.shard == "auto":
        return f"algorithm {options.algorithm} was named, and joins all ranks; with shard='node' it joins the nodes"
    return ""


def _different_processors(group: Group) -> str:
    """Every node updates all parameters, and must get the same bits. Empty where processors are alike. Collective."""
    own = f"{torch.backends.cpu.get_cpu_capability()} under torch {torch.__version__}"
    everyones = [text.decode() for text in gather_bytes(group, own.encode(), "processors")]
    if len(set(everyones)) == 1:
        return ""
    return f"nodes that all update need processors that round alike, and there are {sides_of(everyones)}"
