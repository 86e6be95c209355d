"""Memory for the ranks of a node: one window for a group on one node; on several nodes a group for each, and groups
across."""

from __future__ import annotations

import logging
import mmap
import struct
from collections.abc import Sequence
from functools import partial

from ..errors import PeerLostError, SharedMemoryError
from ..transport.base import PIGGYBACK_RANKS
from ..window.area import ALIGN_BYTES, Place
from ..window.exchange import WindowWait
from ..window.memory import Window
from ..window.opening import Gather, Opening
from .control import gather_bytes
from .group import Group
from .leaders import Leaders, area_bytes
from .waiting import SPIN_S, gone_words, silence_of, wait_until
from .waiting import under_way as others_under_way

log = logging.getLogger("commlab")

_PLACE = struct.Struct("<QQ")
_OPENING = "the opening of a window"
_LOOK_S = 10e-3
"""So often a rank looks again who has opened the window: one that could not wakes nobody."""


def spin_us_of(group: Group) -> float:
    """How long at most a rank in the window looks before it sleeps."""
    return 0.0 if group.crowded else SPIN_S * 1e6


def open_window(
    group: Group, gather: Gather | None = None, opened: tuple[Opening, Sequence[bytes]] | None = None
) -> None:
    """Share memory among all ranks of ``group``, which must be on one node. Collective. Where the memory can't be had
    on any rank, no rank has it, and ``group.window_reason`` says why. ``gather(data, name)``: a quicker way than the
    group's to bring every rank's data to every rank. ``opened``: this rank's opening, and all ranks' cards, where they
    have been exchanged already."""
    if group.size == 1 or len(group.nodes) > 1:
        group.window_reason = "one rank" if group.size == 1 else f"the ranks are on {len(group.nodes)} nodes"
        return
    spin_us = spin_us_of(group)
    gather = gather or partial(gather_bytes, group)
    if opened is None:
        opening = Opening(group.local_rank, group.size)
        opened = opening, gather(opening.card, "window cards, or reasons against a window")
    opening, cards = opened
    window, group.window_reason = opening.conclude(cards, spin_us, gather, partial(_arrived, group))
    if window is not None:
        group.share(window)
    elif group.rank == 0:
        log.warning("no window for the ranks of this node, which send messages instead: %s", group.window_reason)


class _Arrival:
    """Waits until all ranks have said in their control pages how the opening went (:class:`.waiting.Waiter`)."""

    def __init__(self, group: Group, window: Window):
        self._group, self._window, self.driver = group, window, group.progress
        self._wait = WindowWait(window)

    def finished(self) -> bool:
        return self._wait.test()

    def advance(self) -> object:
        return self._wait.peers()

    def rest(self, idle_s: float) -> None:
        self._wait.block(1e-3 if others_under_way else _LOOK_S)

    def gone(self) -> str:
        return gone_words(self._group.rank, self._wait.peers(), self._group.departed, lambda: _OPENING)

    def silence(self, idle_s: float) -> str:
        peers = list(self._wait.peers())
        return silence_of(self._group.rank, peers, "rank", idle_s, _OPENING) if peers else ""


def _arrived(group: Group, window: Window) -> None:
    waiter = _Arrival(group, window)
    try:
        wait_until(waiter.finished, waiter, group.timeout_s)
    except PeerLostError as error:
        where = f"rank {group.rank}, in {_OPENING}: "
        raise error if _OPENING in str(error) else PeerLostError(f"{where}{error}") from error


def open_levels(group: Group) -> tuple[tuple[Group, Group] | None, str]:
    """Two groups more, like ``group.node`` and ``group.across``, with queues and a window that no other operation uses,
    for whoever has operations under way in both at a time. None where a node's memory can't be had, and why. The caller
    closes them. Collective over ``group``, whose nodes have windows."""
    assert group.node is not None and group.across is not None
    node = group.node.subgroup(range(group.node.size))
    assert node is not None
    open_window(node)
    reason = "" if node.window is not None else node.window_reason
    reasons = gather_bytes(group, reason.encode(errors="backslashreplace"), "reasons against a window")
    if any(reasons):
        node.close()
        return None, next(reason.decode() for reason in reasons if reason)
    across = group.across.subgroup(range(group.across.size))
    assert across is not None
    # An operation that breaks off in one of them leaves the others in the middle of theirs.
    for level in (node, across):
        group.progress.tie(level.progress)
    return (node, across), ""


def open_nodes(group: Group) -> None:
    """Make the groups of each node, with a window, and across nodes, and the short way of few numbers. Collective over
    ``group``. Where one of both can't be done on all nodes, no rank has it."""
    _open_both_ways(group)
    _open_leaders(group)


def _open_both_ways(group: Group) -> None:
    local_sizes = {len(node) for node in group.nodes}
    if len(local_sizes) != 1 or local_sizes == {1}:
        group.window_reason = (
            f"nodes have {sorted(map(len, group.nodes))} ranks: hierarchical wants equally many, and more than one"
        )
        return
    for ranks in group.nodes:
        node = group.subgroup(ranks)
        if node is not None:
            open_window(node)
            group.node = node
    assert group.node is not None
    reason = group.node.window_reason.encode(errors="backslashreplace")
    reasons = gather_bytes(group, reason, "reasons against a window")
    if any(reasons):
        group.node.close()
        group.node, group.window_reason = None, next(reason.decode() for reason in reasons if reason)
        return
    group.window_reason = f"the ranks are on {len(group.nodes)} nodes, and each node has a window of its own"
    for local_rank in range(group.local_size):
        group.across = group.subgroup([node[local_rank] for node in group.nodes]) or group.across
    assert group.across is not None
    # An operation of the whole that breaks off leaves the levels in the middle of theirs, and the other way round.
    for level in (group.node, group.across):
        group.progress.tie(level.progress)


def _open_leaders(group: Group) -> None:
    """Make ``group.leaders``, where links join nodes of several ranks."""
    if not (group.transport.moves_itself and group.agreement.required and 1 < len(group.nodes) < group.size):
        return
    if group.size > PIGGYBACK_RANKS:
        return
    node = None
    for ranks in group.nodes:
        if len(ranks) > 1:
            node = group.subgroup(ranks) or node
    if node is not None:
        open_window(node)
    reason = "" if node is None or node.window is not None else node.window_reason
    areas: Sequence[int] = ()
    if group.across is not None and node is not None and node.window is not None:
        areas, reason = _leaders_areas(node, node.window)
    # Here all ranks of a node have opened its pages, and nobody waits there any more.
    reasons = gather_bytes(group, reason.encode(errors="backslashreplace"), "reasons against leaders")
    if any(reasons):
        if node is not None:
            node.close()
        return
    between = group.split([ranks[0] for ranks in group.nodes])
    window = None if node is None else node.window
    group.leaders = Leaders(group.transport, between, group.nodes, window, areas, spin_us_of(group))
    group.barrier()  # nobody writes into a page that its owner has still to clear


def _leaders_areas(node: Group, window: Window) -> tuple[list[int], str]:
    """Where the ranks of ``node`` have memory for more numbers than a page holds; or why there is none. Collective over
    ``node``."""
    size_bytes, reason, place = area_bytes(node.size), "", b""
    # No two ranks' begin at the same place of a page, or the loops that read them side by side would have them all in
    # one set of a cache.
    offset = node.rank * (mmap.PAGESIZE // node.size // ALIGN_BYTES * ALIGN_BYTES) % mmap.PAGESIZE
    try:
        segment = window.area.new_segment(-(-(offset + size_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE)
        place = _PLACE.pack(segment, offset)
    except SharedMemoryError as error:
        reason = str(error)
    places = gather_bytes(node, place, "places in a window")
    if not all(places):
        return [], reason or "another rank of this node has no memory for the leaders"
    try:
        return [window.address(rank, Place(*_PLACE.unpack(each))) for rank, each in enumerate(places)], ""
    except SharedMemoryError as error:
        return [], str(error)
