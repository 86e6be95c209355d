"""Declared nodes of one launch under mpirun: groups of several nodes, each with a window, for tests of what a node does
as one."""

from __future__ import annotations

import pytest
from mpi_ranks import TIMEOUT_S, Ranks

from commlab.job.topology import declared
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group
from commlab.runtime.links import open_links
from commlab.runtime.nodes import open_nodes
from commlab.strategies.engine import Engine

LAYOUTS = {
    "2 nodes of 2": ((0, 1, 2, 3), "2", "mpi"),
    "2 nodes of 3": ((1, 2, 3, 4, 5, 6), "0-2,3-5", "mpi"),
    "3 nodes of 2, linked": ((7, 5, 3, 1, 0, 2), "2", "tcp"),
    "3 nodes of 1": ((3, 1, 0), "1", "mpi"),
}
"""Ranks of the launch, the nodes that they are on, and what joins them."""

_made: dict[tuple[Group, str], Group | None] = {}


def close_nodes() -> None:
    """Close all groups that :func:`nodes_of` has made. Collective over all."""
    for group in _made.values():
        if group is not None and not group._closed:
            group.close()
    _made.clear()


def nodes_of(ranks: Ranks, layout: str) -> Group | None:
    """This rank's group of a layout, kept for the next test; None on ranks that are not in it. Collective over all."""
    members, nodes, links = LAYOUTS[layout]
    key = ranks.world, layout
    if key not in _made:
        part = ranks.subgroup(members)
        _made[key] = None
        if part is not None:
            found, transport = declared(nodes, len(members)), part.transport
            if links == "tcp":
                transport, _ = open_links(Group(transport, found, TIMEOUT_S, cores=1), links, None, True)
            part.progress.close()
            _made[key] = group = Group(transport, found, TIMEOUT_S, cores=1)
            open_nodes(group)
            assert group.node is not None or nodes == "1", group.window_reason
    return _made[key]


def four(ranks: Ranks) -> Group:
    """2 nodes of 2 ranks, which are half of a launch of 8; the others wait for the end of the test. Collective over
    all."""
    found = nodes_of(ranks, "2 nodes of 2")
    if found is None:
        pytest.skip("not one of the 4 ranks")
    return found


def require_writes_stay_on_the_node(group: Group, engine: Engine, writer: int) -> None:
    """What ``writer`` writes to a parameter is seen by the ranks of its node alone. Collective."""
    parameter = engine.parameters[0].tensor
    group.barrier()
    if group.rank == writer:
        parameter.data[0, 0] = 77.0
    group.barrier()
    assert (parameter[0, 0] == 77.0) == (group.rank in group.topology.node_of(writer))
    group.barrier()


def everyones(group: Group, text: str) -> list[str]:
    """All ranks' ``text``. Collective."""
    return [row.decode() for row in gather_bytes(group, text.encode(), "notes")]
