"""From the store that torch.distributed hands over to a group of commlab: who shares a node, the window of those who
do, and links between nodes. Only the members take part, and no connection is made where all of them are on one node."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist

from ..errors import PeerTimeoutError, UsageError
from ..job import topology
from ..job.topology import Topology
from ..runtime.group import Group
from ..runtime.links import CONNECT_S
from ..runtime.nodes import open_nodes, open_window
from ..transport import handshake
from ..transport.base import Transport
from ..transport.sim import SimNetwork
from ..transport.tcp import Links, missing_reason
from ..transport.torchdist import TorchTransport
from ..transport.torchstore import StoreTransport
from ..window.opening import Opening

NODES = "COMMLAB_NODES"
"""Declares which ranks of the job share a node, as ``commlab.init(nodes=...)`` does."""
WINDOW = "COMMLAB_WINDOW"
"""``off``: ranks of a node send messages instead of sharing memory."""
LINKS = "COMMLAB_LINKS"
"""What joins ranks that share no window: ``auto``, links where they can be had and else gloo; ``tcp``, an error where
they can't; ``gloo``."""
IFACE = "COMMLAB_IFACE"
"""The network interfaces that links use, by name, joined by commas."""

_job_links: Links | None = None
"""Links between all ranks of the job, once a group of all of them was opened: later groups use them too."""


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
    card = {
        "rank": here.rank,
        "node": _node_key(here),
        "cores": topology.bound_cores(),
        "nodes": nodes,
        "window": window,
        "links": os.environ.get(LINKS, "auto"),
        "iface": os.environ.get(IFACE, ""),
        "against": missing_reason(),
        "context": -1 if _job_links is None or _job_links.closed else _job_links.contexts.offered,
    }
    # Most groups have one node: the window's cards travel with the others, in the only exchange that they need.
    opening = Opening(rank, size) if window != "off" else None
    try:
        told = json.dumps(card).encode() + b"\n" + (b"" if opening is None else opening.card)
        said = [found.partition(b"\n") for found in transport.gather(told, "the members' addresses")]
        cards: list[dict[str, Any]] = [json.loads(found) for found, _, _ in said]
        _require_equal(rank, cards)
        found = topology.from_keys([card["node"] for card in cards])
        cores = topology.cores_of_node([card["cores"] for card in cards], found.nodes, rank) // (2 if aside else 1)
        if len(found.nodes) == 1 and opening is not None:
            group = Group(transport, found, timeout_s, True, cores, not aside)
            open_window(group, transport.gather, (opening, [mine for _, _, mine in said]))
            if group.window is not None:
                return group
            group.progress.close()
            reason = group.window_reason
        else:
            reason = f"{WINDOW}=off"
    except BaseException:
        if opening is not None:
            opening.give_up()
        raise
    if opening is not None:
        opening.give_up()
    messages, links_reason = _messages(store, transport, cards, here, timeout_s)
    group = Group(messages, found, timeout_s, True, cores, not aside)
    group.window_reason, group.links_reason = reason, links_reason
    if len(found.nodes) > 1 and window != "off":
        open_nodes(group)
    return group


def _require_equal(rank: int, cards: Sequence[dict[str, Any]]) -> None:
    """UsageError where what the environment says of groups differs between the members."""
    for variable, word in ((NODES, "nodes"), (WINDOW, "window"), (LINKS, "links"), (IFACE, "iface")):
        if len({str(card[word]) for card in cards}) > 1:
            raise UsageError(f"rank {rank}: {variable} differs between ranks: {[card[word] for card in cards]}")


def _messages(
    store: dist.Store, transport: StoreTransport, cards: Sequence[dict[str, Any]], here: Member, timeout_s: float
) -> tuple[Transport, str]:
    """What carries messages between the members, and why."""
    global _job_links
    rank, size, wanted = transport.rank, transport.size, cards[0]["links"]
    if wanted not in ("auto", "tcp", "gloo"):
        raise UsageError(f"rank {rank}: {LINKS}={wanted!r}; there are auto, tcp and gloo")
    against = next((f"rank {at}: {card['against']}" for at, card in enumerate(cards) if card["against"]), "")
    if wanted == "gloo":
        against = "as asked for"
    elif against and wanted == "tcp":
        raise UsageError(f"links between ranks can't be had: {against}")
    if not against:
        contexts = [card["context"] for card in cards]
        if min(contexts) >= 0:
            assert _job_links is not None
            return _job_links.among([card["rank"] for card in cards], max(contexts)), "links of the job"
        gather = partial(transport.gather, name="cards of the links")
        try:
            ends = handshake.connect(rank, gather, True, cards[0]["iface"] or None, min(CONNECT_S, timeout_s))
            links = Links(rank, ends, launched=transport, shared=size == here.size)
            if size == here.size:
                _job_links = links
            return links.world(), "links"
        except (UsageError, PeerTimeoutError) as error:
            if wanted == "tcp":
                raise
            against = str(error)
    return TorchTransport(dist.PrefixStore("links", store), rank, size, timeout_s), f"no links: {against}"
