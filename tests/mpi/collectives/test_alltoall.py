"""alltoall again and again with tensors of one shape: what the first call has worked out serves the next ones, whatever
way other ranks go, and sees what has changed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from mpi_ranks import Ranks
from mpi_windows import close_all, window_group

import commlab
from commlab.runtime.group import Group

PARTS = (1, 3, 5_000, 40_000, 300_000)
"""Numbers for each rank: in a page, a room, and rounds."""


@pytest.fixture(params=[2, 3, 8])
def group(ranks: Ranks, request: pytest.FixtureRequest) -> Group | None:
    return window_group(ranks, *range(request.param))


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_all()


def given(frm: int, size: int, part: int, turn: int) -> torch.Tensor:
    """What rank ``frm`` has: another number for each rank, place and turn."""
    each = [torch.arange(part, dtype=torch.int32) + 7 * frm + 101 * to + 1009 * turn for to in range(size)]
    return torch.cat(each)


def arrived(to: int, size: int, part: int, turn: int) -> torch.Tensor:
    return torch.cat([given(frm, size, part, turn)[to * part : (to + 1) * part] for frm in range(size)])


@pytest.mark.parametrize("part", PARTS)
def test_the_same_shape_in_other_memory(ranks: Ranks, group: Group | None, part: int) -> None:
    """Rank 1 takes the long way in every other turn: numbers that do not lie in a row, or both tensors in one memory;
    rank 0 now and then has another operation under way."""
    if group is None:
        return
    rank, size = group.rank, group.size
    for turn in range(6):
        tensor, want = given(rank, size, part, turn), arrived(rank, size, part, turn)
        out = torch.full_like(tensor, -1)
        handle = commlab.allreduce_async(torch.ones(70_000), "sum", group=group) if turn % 3 == 2 else None
        if rank == 1 and turn % 4 == 1:
            tensor = torch.stack([tensor, tensor], 1)[:, 0]
        if rank == 1 and turn % 4 == 3:
            out = tensor
        version = out._version
        assert commlab.alltoall(out, tensor, group=group) is out
        assert torch.equal(out, want) and out._version > version
        if handle is not None:
            assert (handle.wait() == size).all()


def test_a_shape_that_one_rank_changes(ranks: Ranks) -> None:
    """After calls on which all agreed: a disagreement on all ranks, nothing written, and the group goes on."""
    group = window_group(ranks, 0, 1, 2)
    if group is None:
        return
    for part in (4, 30_000):
        for turn in range(3):
            numel = 3 * part if turn < 2 or group.rank != 1 else 6 * part
            tensor, out = torch.ones(numel), torch.zeros(numel)
            if turn < 2:
                commlab.alltoall(out, tensor, group=group)
                assert out.sum() == numel
                continue
            with pytest.raises(commlab.DisagreementError, match=r"rank [012] sends \d+ bytes to rank [012], which"):
                commlab.alltoall(out, tensor, group=group)
            assert not out.any()
        group.barrier()


def test_memory_that_may_not_be_written(ranks: Ranks) -> None:
    """Refused on all ranks also where calls of that shape were made before."""
    group = window_group(ranks, 0, 1)
    if group is None:
        return
    out, tensor = torch.zeros(4), torch.ones(4)
    for _ in range(2):
        commlab.alltoall(out, tensor, group=group)
    expanded = torch.zeros(1).expand(4)
    with pytest.raises(commlab.RefusedError, match="share one place in memory"):
        commlab.alltoall(expanded if group.rank else out, tensor, group=group)
    with pytest.raises(commlab.RefusedError, match="of one dtype"):
        commlab.alltoall(out, tensor.double() if group.rank else tensor, group=group)
    commlab.alltoall(out, tensor, group=group)
