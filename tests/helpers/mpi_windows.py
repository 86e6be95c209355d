"""Groups that share a window, for every number of ranks from 2 to all, inside one launch."""

from __future__ import annotations

import torch
from mpi_ranks import Ranks

from commlab.runtime.group import Group
from commlab.runtime.nodes import open_window

GROUPS = ((0, 1, 2, 3), (4, 5, 6), (6, 7))
"""4, 3 and 2 ranks of one launch, nearly all of them at once."""

_opened: dict[tuple[Group, tuple[int, ...]], Group | None] = {}
_pools: dict[Group, torch.Tensor] = {}


def window_group(ranks: Ranks, *members: int) -> Group | None:
    """A group of these ranks with a window; None on the others. Collective over all ranks; kept for the next test."""
    key = ranks.world, members
    if key not in _opened:
        group = ranks.subgroup(members)
        if group is not None and group.size > 1:
            open_window(group)
            assert group.window is not None, group.window_reason
        _opened[key] = group
    return _opened[key]


def window_groups(ranks: Ranks) -> list[Group]:
    """This rank's groups: all ranks, and for every way to halve them the part that it is in, if that has two ranks."""
    found = []
    for first in ranks.splits:
        parts = [tuple(part) for part in (range(first), range(first, ranks.size)) if part]
        groups = [window_group(ranks, *part) for part in parts]
        found += [group for group in groups if group is not None and group.size > 1]
    return found


def few_ranks(ranks: Ranks) -> list[Group]:
    """This rank's groups among :data:`GROUPS`: one, two or none of them. Collective."""
    made = [window_group(ranks, *members) for members in GROUPS]
    return [group for group in made if group is not None]


def close_all() -> None:
    """Close the groups that were opened here; forget those of ranks that a failure has left apart. Collective."""
    for group in _opened.values():
        if group is not None and not group._closed:
            group.close()
    _opened.clear()
    _pools.clear()


def in_window(group: Group, data: torch.Tensor, skip: int = 0) -> torch.Tensor:
    """A copy of ``data`` in the window, ``skip`` numbers behind a cache line. The group's next copy overwrites it."""
    import commlab

    if group not in _pools:
        _pools[group] = commlab.empty(9 * 2**20, torch.uint8, group)
    pool = _pools[group].view(data.dtype)[skip : skip + data.numel()].view(data.shape)
    assert group.window is not None
    assert data.numel() == 0 or group.window.locate(pool) is not None
    return pool.copy_(data)


def ordinary(group: Group, data: torch.Tensor) -> torch.Tensor:
    """A copy of ``data`` in this process's own memory."""
    return data.clone()


def odd(group: Group, data: torch.Tensor) -> torch.Tensor:
    """A copy of ``data`` in the window, behind a cache line's begin, on every rank somewhere else."""
    return in_window(group, data, 1 + group.rank % 5)


def mixed(group: Group, data: torch.Tensor) -> torch.Tensor:
    """A copy of ``data`` in the window, but for every third rank's, which is in its own memory."""
    return data.clone() if group.rank % 3 == 1 else in_window(group, data)
