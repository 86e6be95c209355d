"""From the store that torch.distributed hands over to a group of commlab: who shares a node, and the window of those
who do. Only the members take part, and no connection is made where all of them are on one node."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

import torch.distributed as dist

from ..errors import UsageError
from ..job import topology
from ..job.topology import Topology
from ..runtime.group import Group
from ..runtime.nodes import open_nodes, open_window
from ..transport.sim import SimNetwork
from ..transport.torchdist import TorchTransport
from ..transport.torchstore import StoreTransport

NODES = "COMMLAB_NODES"
"""Declares which ranks of the job share a node, as ``commlab.init(nodes=...)`` does."""
WINDOW = "COMMLAB_WINDOW"
"""``off``: ranks of a node send messages instead of sharing memory."""


class Member(NamedTuple):
    """Where this process stands in the job."""

    rank: int
    size: int


def _node_key(here: Member) -> str:
    """Equal on two ranks exactly when they share a node."""
    text = os.environ.get(NODES)
    if not text:
        return topology.node_key()
    return f"declared {topology.declared(text, here.size).node_of(here.rank)}"


def connect(
    store: dist.Store | None, rank: int, size: int, timeout_s: float, here: Member, aside: bool = False
) -> Group:
    """The group of ``size`` ranks that share ``store``, in which no other keys are. Collective over them. ``aside``: a
    thread beside the one that computes moves the group on: it needs none of its own, and a rank that waits leaves its
    core to the computation unless it has two."""
    if store is None or size == 1:
        return Group(SimNetwork(1).transports()[0], Topology(((0,),)), timeout_s, threaded=not aside)
    transport = StoreTransport(dist.PrefixStore("meet", store), rank, size, timeout_s)
    window = os.environ.get(WINDOW, "auto")
    if window not in ("auto", "off"):
        raise UsageError(f"rank {rank}: {WINDOW}={window!r}; there are auto and off")
    nodes = os.environ.get(NODES, "")
    card = {"node": _node_key(here), "cores": topology.bound_cores(), "nodes": nodes, "window": window}
    cards: list[dict[str, Any]] = [
        json.loads(found) for found in transport.gather(json.dumps(card).encode(), "the members' addresses")
    ]
    for variable, word in ((NODES, "nodes"), (WINDOW, "window")):
        if len({str(found[word]) for found in cards}) > 1:
            raise UsageError(f"rank {rank}: {variable} differs between ranks: {[found[word] for found in cards]}")
    found = topology.from_keys([card["node"] for card in cards])
    cores = topology.cores_of_node([card["cores"] for card in cards], found.nodes, rank) // (2 if aside else 1)
    if len(found.nodes) == 1 and window != "off":
        group = Group(transport, found, timeout_s, True, cores, not aside)
        open_window(group, transport.gather)
        if group.window is not None:
            return group
        group.progress.close()
        reason = group.window_reason
    else:
        reason = f"{WINDOW}=off"
    messages = TorchTransport(dist.PrefixStore("links", store), rank, size, timeout_s)
    group = Group(messages, found, timeout_s, True, cores, not aside)
    group.window_reason = reason
    if len(found.nodes) > 1 and window != "off":
        open_nodes(group)
    return group
