"""Groups and parameter servers of one process whose operations ranks wait for in different orders."""

from __future__ import annotations

import itertools

import pytest
import torch
from closed_form import expected, numbers
from mpi_ranks import Ranks

import commlab
from commlab.runtime.group import Group

pytestmark = pytest.mark.mpi(min_size=2)


def total(group: Group, numel: int) -> torch.Tensor:
    return expected("sum", group.size, numel, torch.float32)


@pytest.mark.parametrize("numel", [3, 30_000])
def test_two_groups_in_another_order_on_every_rank(ranks: Ranks, numel: int) -> None:
    """B2: whoever waits moves all groups on; with the window, and in messages, and one of each."""
    messages = [ranks.group(*range(ranks.size)), ranks.group(*reversed(range(ranks.size)))]
    assert messages[0] is not None
    assert messages[1] is not None
    for pair in itertools.permutations((ranks.world, *messages), 2):
        first, second = pair if ranks.rank % 2 else reversed(pair)
        mine, other = numbers(first.rank, numel, torch.float32), numbers(second.rank, numel, torch.float32)
        handle = commlab.allreduce_async(mine, "sum", group=first)
        assert torch.equal(commlab.allreduce(other, "sum", group=second), total(second, numel))
        assert torch.equal(handle.wait(), total(first, numel))


def test_three_groups_and_a_circle(ranks: Ranks) -> None:
    """B2: no two ranks wait for the same one; each group's operation is under way somewhere."""
    groups = [ranks.world, ranks.group(*range(ranks.size)), ranks.group(*reversed(range(ranks.size)))]
    turned = groups[ranks.rank % 3 :] + groups[: ranks.rank % 3]
    for _ in range(3):
        handles = []
        for group in turned[:2]:
            assert group is not None
            handles.append(commlab.allreduce_async(numbers(group.rank, 5000, torch.float32), "sum", group=group))
        last = turned[2]
        assert last is not None
        commlab.allreduce(numbers(last.rank, 5000, torch.float32), "sum", group=last)
        for group, handle in zip(turned[:2], handles, strict=True):
            assert group is not None
            assert torch.equal(handle.wait(), total(group, 5000))


def test_subgroups_are_made_while_others_wait_elsewhere(ranks: Ranks) -> None:
    """B21: making a group is no place where a rank stands still."""
    other = ranks.group(*reversed(range(ranks.size)))
    assert other is not None
    handle = commlab.allreduce_async(numbers(other.rank, 3000, torch.float32), "sum", group=other)
    if ranks.rank % 2:
        handle.wait()
    made = ranks.subgroup(range(ranks.size))
    assert made is not None
    assert torch.equal(handle.wait(), total(other, 3000))
    made.barrier()


def test_a_store_and_a_group(ranks: Ranks) -> None:
    """B21: a worker that waits for its server moves the group on, and one that waits for the group its messages."""
    weights = {"w": torch.zeros(50_000)}
    world = ranks.world
    store = commlab.ParameterServer(weights.items(), None, servers=1, group=world)
    if store.role == "worker":
        group = store.group
        for step in range(3):
            gradient = torch.full((50_000,), float(group.rank + 1))
            pushed = store.push("w", gradient)
            summed = commlab.allreduce_async(numbers(group.rank, 5000, torch.float32), "sum", group=group)
            if (group.rank + step) % 2:
                pushed.wait()
                store.step()
                out = store.pull("w", weights["w"])
                out.wait()
                assert torch.equal(summed.wait(), total(group, 5000))
            else:
                assert torch.equal(summed.wait(), total(group, 5000))
                pushed.wait()
                store.step()
                store.pull("w", weights["w"]).wait()
        store.close()
    world.barrier()


def test_many_groups_and_stores_made_and_dropped(ranks: Ranks) -> None:
    """B15: they take nothing of MPI, which has room for some 2,000 communicators; nor threads, nor memory."""
    world, pair = ranks.world, ranks.group(0, 1)
    for at in range(2500 if pair is not None else 0):
        assert pair is not None
        group = pair.subgroup([at % 2, 1 - at % 2])
        assert group is not None
        if at % 250 == 0:
            mine = numbers(group.rank, 10, torch.float32)
            assert torch.equal(commlab.allreduce(mine, "sum", group=group), total(group, 10))
            alone = group.subgroup([1])
            if alone is not None:
                alone.barrier()
    before = len(world.endings)
    for _ in range(20):
        weights = {"w": torch.zeros(4)}
        store = commlab.ParameterServer(weights.items(), None, servers=1, group=world)
        if store.role == "worker":
            store.push("w", torch.ones(4)).wait()
            store.step()
            assert (store.pull("w", weights["w"]).wait() == 1).all()
            store.close()
    assert len(world.endings) == before
    world.barrier()
