"""Tensors of every make: strided, 0-d, empty, with gradients; reduced in place, and nothing beside them touched."""

from __future__ import annotations

import pytest
import torch
from closed_form import expected, numbers
from mpi_groups import algorithms, all_groups
from mpi_ranks import Ranks

import commlab
from commlab.chunks import split


def strided(base: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ways to look at 24 numbers, none of which is the plain flat one."""
    return {
        "transposed": base.clone().view(4, 6).t(),
        "every second": torch.stack([base, torch.full_like(base, -1)], 1)[:, 0],
        "inner block": torch.nn.functional.pad(base.view(4, 6), (1, 2, 1, 1))[1:-1, 1:-2],
        "channels last": base.clone().view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "offset": torch.cat([torch.zeros(3, dtype=base.dtype), base])[3:],
        "5-d": base.clone().view(1, 2, 3, 4, 1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_any_stride(ranks: Ranks, dtype: torch.dtype) -> None:
    for group in all_groups(ranks):
        wants = strided(expected("sum", group.size, 24, dtype))
        for name, mine in strided(numbers(group.rank, 24, dtype)).items():
            strides = mine.stride()
            got = commlab.allreduce(mine, "sum", name=name, algorithm="direct", group=group)
            assert got is mine
            assert got.stride() == strides
            assert torch.equal(got, wants[name]), name
        received = strided(numbers(group.rank, 24, dtype))["inner block"]
        commlab.broadcast(received, root=group.size - 1, group=group)
        assert torch.equal(received, numbers(group.size - 1, 24, dtype).view(4, 6))


@pytest.mark.parametrize("algorithm", ["auto", "ring"])
def test_every_rank_may_have_its_own_strides(ranks: Ranks, algorithm: str) -> None:
    for group in (ranks.world, ranks.halves(ranks.size // 2)):
        for numel in (24, 24_000):
            mine = numbers(group.rank, numel, torch.float32).view(4, -1)
            if group.rank % 3 == 1:
                mine = mine.t().contiguous().t()
            elif group.rank % 3 == 2:
                mine = torch.nn.functional.pad(mine, (0, 1))[:, :-1]
            commlab.allreduce(mine, "sum", algorithm=algorithm, group=group)
            assert torch.equal(mine, expected("sum", group.size, numel, torch.float32).view(4, -1)), (group.size, numel)


def test_what_lies_between_the_strides_stays_as_it_was(ranks: Ranks) -> None:
    group = ranks.world
    whole = torch.full((5, 8), 7.0)
    commlab.allreduce(whole[1:-1, ::2].fill_(1.0), "sum", group=group)
    assert (whole[1:-1, ::2] == group.size).all()
    assert (whole[:, 1::2] == 7).all()
    assert (whole[[0, -1]] == 7).all()


@algorithms
def test_zero_dimensions_and_no_elements(ranks: Ranks, algorithm: str) -> None:
    for group in all_groups(ranks):
        point = torch.tensor(float(group.rank + 1))
        assert commlab.allreduce(point, "sum", algorithm=algorithm, group=group) is point
        assert point.shape == ()
        assert point == group.size * (group.size + 1) / 2
        nothing = torch.empty(3, 0, 2)
        assert commlab.allreduce(nothing, algorithm=algorithm, group=group) is nothing
        commlab.broadcast(nothing, root=group.size - 1, algorithm=algorithm, group=group)
        commlab.reduce(point, 0, "max", algorithm=algorithm, group=group)
        commlab.reduce_scatter(torch.empty(0), torch.empty(0), group=group, algorithm=algorithm)


def test_parameters_and_their_gradients(ranks: Ranks) -> None:
    """Tensors that require gradients are reduced in place like others, and stay leaves."""
    group = ranks.world
    weight = torch.nn.Parameter(torch.full((3, 4), float(group.rank)))
    (2.0 * (group.rank + 1) * weight).sum().backward()
    commlab.allreduce(weight.grad, "sum", group=group)
    commlab.broadcast(weight, root=group.size - 1, group=group)
    commlab.reduce_scatter(weight.detach().view(-1)[: split(12, group.size)[group.rank].numel], weight, group=group)
    part = torch.nn.Parameter(torch.zeros(split(12, group.size)[group.rank].numel))
    commlab.reduce_scatter(part, torch.arange(12.0), group=group)
    assert (weight.grad == group.size * (group.size + 1)).all()
    assert weight.is_leaf
    assert weight.requires_grad
    assert torch.equal(part.data, torch.arange(12.0)[slice(*split(12, group.size)[group.rank])])
