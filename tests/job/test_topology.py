"""Which ranks share a node: from keys, by declaration, and as a subgroup sees it."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commlab.errors import UsageError
from commlab.job.topology import Topology, bound_cores, cores_of_node, declared, from_keys, node_key, usable_cores


def test_ranks_with_one_key_share_a_node() -> None:
    found = from_keys(["red", "blue", "red", "green", "blue"])
    assert found.nodes == ((0, 2), (1, 4), (3,))
    assert found.size == 5
    assert found.node_of(4) == (1, 4)
    assert [found.local_rank(rank) for rank in range(5)] == [0, 0, 1, 0, 1]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_every_rank_lies_on_one_node(keys: list[str]) -> None:
    found = from_keys(keys)
    assert sorted(rank for node in found.nodes for rank in node) == list(range(len(keys)))
    assert list(found.nodes) == sorted(found.nodes), "nodes are ordered by their lowest rank"
    for rank, key in enumerate(keys):
        assert [keys[peer] == key for peer in range(len(keys))] == [
            peer in found.node_of(rank) for peer in range(len(keys))
        ]
        assert found.node_of(rank)[found.local_rank(rank)] == rank


@pytest.mark.parametrize(
    ("text", "size", "nodes"),
    [
        ("2", 5, ((0, 1), (2, 3), (4,))),
        ("8", 3, ((0, 1, 2),)),
        ("1", 2, ((0,), (1,))),
        ("0-3,4-7", 8, ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("2-3,0-1", 4, ((0, 1), (2, 3))),
        ("0,1-2", 3, ((0,), (1, 2))),
    ],
)
def test_declared(text: str, size: int, nodes: tuple[tuple[int, ...], ...]) -> None:
    assert declared(text, size).nodes == nodes


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "0-", "a-b", "0-1-2", "1.5", "²"])
def test_declared_refuses_what_it_cannot_read(text: str) -> None:
    with pytest.raises(UsageError, match=r"--nodes .*ranks per node"):
        declared(text, 4)


@pytest.mark.parametrize("text", ["0-1", "0-1,1-3", "0-4", "0-3,0-3", "1-3", "0-3,5-4", "3-0", "0-99999999999"])
def test_declared_refuses_ranks_missing_or_twice(text: str) -> None:
    with pytest.raises(UsageError, match=r"--nodes .*each of the ranks 0\.\.3 exactly once"):
        declared(text, 4)


def test_subgroup() -> None:
    whole = Topology(((0, 1, 2), (3, 4), (5,)))
    assert whole.subgroup([4, 1, 0, 3]).nodes == ((0, 3), (1, 2))
    assert whole.subgroup([5]).nodes == ((0,),)
    assert whole.subgroup(range(6)) == whole


def test_a_rank_on_no_or_two_nodes_is_our_own_mistake() -> None:
    for nodes in (((0,), (2,)), ((0, 1), (1,))):
        with pytest.raises(AssertionError, match="exactly one node"):
            Topology(nodes)


def test_node_key_and_cores() -> None:
    assert node_key() == node_key()
    assert os.uname().nodename.split(".")[0] in node_key()
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_cores_of_a_node() -> None:
    """B13: the union of what its ranks are bound to. B23: less where a quota limits their time together, counted once
    for the ranks of one control group."""
    nodes = ((0, 1), (2, 3))
    assert cores_of_node(["0,1 inf ", "2,3 inf ", "0 inf ", "0 inf "], nodes, 0) == 4
    assert cores_of_node(["0,1 inf ", "2,3 inf ", "0 inf ", "0 inf "], nodes, 3) == 1
    together = "0,1,2,3 1.5 /sys/fs/cgroup/box"
    assert cores_of_node([together, together, "0 inf ", "0 inf "], nodes, 0) == 1
    apart = ["0,1,2,3 1.5 /one group", "0,1,2,3 1.5 /another", "0 inf ", "0 inf "]
    assert cores_of_node(apart, nodes, 1) == 3
    bound, quota, _ = bound_cores().split(" ", 2)
    assert len(bound.split(",")) >= usable_cores()
    assert float(quota) > 0
