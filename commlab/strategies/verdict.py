"""What all ranks must know alike of a step's reduced gradient before one of them updates anything."""

from __future__ import annotations

import struct
from typing import NamedTuple

from ..runtime.control import exchange_records
from ..runtime.group import Group

_VERDICT = struct.Struct("<d??")


class Agreement(NamedTuple):
    """What all ranks know of a step's reduced gradient."""

    squares: float
    """Sum of the squares of all numbers, times the square of the loss scale; 0 where it is not wanted."""
    finite: bool
    """Whether there is no inf or NaN in it, nor was in what any rank packed."""
    unused: set[int]
    """Parameters (by index) without a gradient on any rank."""


def agree(group: Group, squares: float, finite: bool, used: set[int], count: int) -> Agreement:
    """One small exchange: the squares, summed in rank order so that all ranks get the same bits, whether all gradients
    are finite, and whether any rank has unused parameters; if so, a second one finds those unused on all. Collective.

    ``used``: which of ``count`` parameters (by index) have a gradient on this rank.
    """
    unused = set(range(count)) - used
    if group.size == 1:
        return Agreement(squares, finite, unused)
    records = exchange_records(group, _VERDICT.pack(squares, finite, bool(unused)), "norm")
    parts, finites, some_unused = zip(*(_VERDICT.unpack(record) for record in records), strict=True)
    if any(some_unused):
        used_here = bytearray(count)
        for index in used:
            used_here[index] = 1
        maps = exchange_records(group, bytes(used_here), "used parameters")
        unused = {index for index in range(count) if not any(row[index] for row in maps)}
    return Agreement(sum(parts), all(finites), unused)
