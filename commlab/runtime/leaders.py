"""Leaders: few numbers of several nodes, each with several ranks, in one native call (kernels/links/leaders.h); where
nodes have equally many ranks, also some hundred KB (:mod:`commlab.collectives.routes.leaders`).

    on each node      members leave their record and their numbers in the window; the leader compares and adds up
    between nodes     leaders announce the record and their node's sums to each other over links, and compare again
    on each node      the leader leaves the result in the window

A node then sends as few frames as if it were one rank, and its other ranks make no system call but to sleep. Ranks that
don't come to an end so, because one of them does something else, is late or is lost, announce the operation from
everyone to everyone: it is reduced there with the same bits, or raises there what it would raise without leaders. What
a page has no room for lies in areas of the window, where the leader adds up too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from ..transport.base import Counts, Pending
from ..window.area import ALIGN_BYTES
from ..window.memory import Window

DONE, LATE, LONG_WAY = range(3)
"""How far the native call has come: ``Leaders::Outcome`` in kernels/links/leaders.h."""

LEADERS_BYTES: Final = 64 * 1024
"""The most that a rank's page has room for."""

AREAS_BYTES: Final = 2 * 2**20
"""Of a node's ranks together, for more numbers than pages have room for. So it is also where the short way ends: the
leader alone adds up what its node has, while by hierarchical all its ranks add and send. What the short way saves is
the same at all sizes; at this one it still took half of hierarchical's time on 2 and 3 hosts with 2 ranks, and a third
on 2 with 4 (docs/links.md)."""

LATE_S = 0.05
"""A leader whose members are later takes the long way, where everyone waits for everyone, and can say for whom."""


def area_bytes(node_size: int) -> int:
    """Of each rank on a node of so many."""
    return AREAS_BYTES // node_size // ALIGN_BYTES * ALIGN_BYTES


class Leaders:
    """The short way of one group, on one of its ranks. ``transport``: the group's own. ``between``: that of the
    leaders, the first ranks of the nodes; None on all others. ``nodes``: the group's ranks on each node. ``window``: of
    this rank's node, used for nothing else; None where the rank is alone there. ``areas``: where in it the node's ranks
    have memory for more numbers than a page holds; none where no rank of the group has. ``spin_us``: how long at most a
    rank looks before it sleeps."""

    def __init__(
        self,
        transport: Any,
        between: Any,
        nodes: Sequence[Sequence[int]],
        window: Window | None,
        areas: Sequence[int],
        spin_us: float,
    ):
        node = next(node for node in nodes if transport.rank in node)
        self.leads, self.nodes, self.node_size = between is not None, len(nodes), len(node)
        self._transport, self._between, self._window = transport, between, window
        sync = None if window is None else window.sync
        self.area_bytes = area_bytes(self.node_size) if areas else 0
        """The most numbers beyond a page that a rank has room for; equal on all ranks."""
        arguments = sync, areas, self.area_bytes, spin_us, LATE_S * 1e6
        self._native: Any = transport.leaders(between, nodes, node, *arguments)
        self.call = self._native.allreduce
        """The native call of an :class:`..transport.base.AtOnce`; its arguments are those of the links' own."""
        self.call_with_shares = self._native.allreduce_shares
        """That of more numbers than a page holds; the last argument says how they are dealt out between the leaders."""

    def resume(
        self,
        counts: Counts,
        long_way: Callable[[Any, Any], tuple[Pending, Any]],
        group: Any,
        signature: Any,
        sequence: int,
        tensor: Any,
        left: int,
    ) -> Pending:
        """``resume`` of an :class:`..transport.base.AtOnce`. ``counts``: what the group counts of an operation that the
        short way ends. ``long_way(group, tensor)``: where this rank turns, the operation as everyone announces it to
        everyone, and what travels with the announcement."""
        if left == LATE:
            request = LeadersRequest(self)
            while not request.test():
                yield request
            if request.done:
                group.count(counts)
                return
        body, attached = long_way(group, tensor)
        yield from group.agreement.before(signature, sequence, body, lambda: attached)

    def wait(self, timeout_us: float) -> int:
        """How far it is after that time at the latest."""
        return LONG_WAY if self._native is None else self._native.wait(timeout_us)

    def peers(self) -> Sequence[int]:
        """The ranks of the group that it waits for."""
        return [] if self._native is None else [self._transport.number_of(rank) for rank in self._native.peers()]

    def close(self) -> None:
        """Let go of the leaders' transport and of the window. An operation under way never comes to an end."""
        if self._between is not None:
            self._between.close()
        if self._window is not None:
            self._window.close()
        # Operations that broke off are kept, and must not keep the memory, nor look at it. With the leaders' transport
        # the last one that worked on it has ended.
        self._window = self._native = None


class LeadersRequest:
    """An operation by the short way: done once its numbers are there, or once this rank has turned to the long way."""

    __slots__ = ("_leaders", "_outcome")

    def __init__(self, leaders: Leaders):
        self._leaders, self._outcome = leaders, LATE

    def test(self) -> bool:
        return self._wait(0.0) != LATE

    def block(self, timeout_s: float) -> None:
        """Wait natively."""
        self._wait(timeout_s * 1e6)

    def _wait(self, timeout_us: float) -> int:
        if self._outcome == LATE:
            self._outcome = self._leaders.wait(timeout_us)
        return self._outcome

    @property
    def done(self) -> bool:
        """Whether the numbers are reduced; only after :meth:`test` has said True."""
        return self._outcome == DONE

    def peers(self) -> Sequence[int]:
        return self._leaders.peers()
