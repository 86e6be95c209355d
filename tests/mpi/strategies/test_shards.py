"""dps where the node is the unit: declared nodes of one launch, each with a window and one copy of the parameters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import training
from mpi_ranks import TIMEOUT_S, Ranks
from mpi_strategies import assert_same_bits_everywhere
from training import Recipe, assert_same, reference, train

from commlab.job.topology import declared
from commlab.runtime.group import Group
from commlab.runtime.links import open_links
from commlab.runtime.nodes import open_nodes

LAYOUTS = {
    "2 nodes of 2": ((0, 1, 2, 3), "2", "mpi"),
    "2 nodes of 2, linked": ((0, 1, 2, 3), "2", "tcp"),
    "2 nodes of 3": ((1, 2, 3, 4, 5, 6), "0-2,3-5", "mpi"),
    "3 nodes of 2, linked": ((7, 5, 3, 1, 0, 2), "2", "tcp"),
}
"""Ranks of the launch, the nodes that they are on, and what joins them."""

_made: dict[tuple[Group, str], Group | None] = {}


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    for group in _made.values():
        if group is not None and not group._closed:
            group.close()
    _made.clear()


def nodes_of(ranks: Ranks, layout: str) -> Group | None:
    """This rank's group of a layout, kept for the next test; None on ranks that are not in it. Collective over all."""
    members, nodes, links = LAYOUTS[layout]
    if max(members) >= ranks.size:
        pytest.skip(f"needs {max(members) + 1} ranks")
    key = ranks.world, layout
    if key not in _made:
        part = ranks.world.subgroup(members)
        _made[key] = None
        if part is not None:
            found, transport = declared(nodes, len(members)), part.transport
            if links == "tcp":
                transport, _ = open_links(Group(transport, found, TIMEOUT_S, cores=1), links, None, True)
            part.progress.close()
            _made[key] = group = Group(transport, found, TIMEOUT_S, cores=1)
            open_nodes(group)
            assert group.node is not None, group.window_reason
    return _made[key]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "recipe, options",
    [
        (Recipe(max_grad_norm=0.5), {"bucket_bytes": 100}),
        (Recipe(max_grad_norm=0.5, accumulation=2, optimizer="AdamW", total_known=False), {}),
        (Recipe(samples=training.EVEN, counted=False), {"bucket_bytes": 300, "algorithm": "ring", "shard": "node"}),
    ],
    ids=["clipped", "AdamW, accumulated, counts summed", "means, ring between nodes"],
)
def test_as_single(ranks: Ranks, layout: str, recipe: Recipe, options: dict[str, object]) -> None:
    """Every step's parameters and norm, for ragged batches, ranks without samples, frozen and unused parameters."""
    group = nodes_of(ranks, layout)
    if group is not None:
        run = train("dps", group, recipe, **options)
        assert run.engine.sharding.startswith("node ("), run.engine.sharding
        assert_same(run, reference(recipe))
        assert_same_bits_everywhere(run)
