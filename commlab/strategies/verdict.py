"""The verdict on a step's reduced gradient: all ranks must know it alike before one of them updates anything."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

from ..runtime.control import exchange_records
from ..runtime.group import Group

_OWN = struct.Struct("<d??Q")


class Verdict(NamedTuple):
    """What all ranks know of a step's reduced gradient."""

    squares: float
    """The sum of the squares of all numbers, times the square of the loss scale; 0 where nobody wants the norm."""
    finite: bool
    """Whether there is no inf or NaN in the reduced gradient, nor was in the numbers that any rank packed."""
    unused: set[int]
    """Parameters (by index) without a gradient on any rank."""
    edits: tuple[int, ...] = ()
    """Of every rank: the digest of what its user has edited, see :mod:`.watch`."""


def of_all_ranks(squares: float) -> Verdict:
    """The verdict where every rank has the whole gradient, whose ``squares`` are known."""
    return Verdict(squares, math.isfinite(squares), set())


def agree(group: Group, squares: float, finite: bool, used: set[int], count: int, edits: int = 0) -> Verdict:
    """One small exchange: the squares, summed in rank order so that all ranks get the same bits, whether all gradients
    are finite, and whether any rank has unused parameters; if so, a second one finds those unused on all. Collective.

    ``squares``: of the numbers that this rank answers for; those of all ranks make up the whole. ``finite``: whether
    all that this rank has packed is. ``used``: which of ``count`` parameters (by index) have a gradient on this rank.
    ``edits``: a digest of what this rank's user has edited.
    """
    finite = finite and math.isfinite(squares)
    unused = set(range(count)) - used
    if group.size == 1:
        return Verdict(squares, finite, unused, (edits,))
    records = exchange_records(group, _OWN.pack(squares, finite, bool(unused), edits), "norm")
    all_squares, finites, some_unused, all_edits = zip(*(_OWN.unpack(record) for record in records), strict=True)
    if any(some_unused):
        unused = unused_on_all(group, used, count)
    return Verdict(sum(all_squares), all(finites), unused, all_edits)


def unused_on_all(group: Group, used: set[int], count: int) -> set[int]:
    """Which of ``count`` parameters (by index) have a gradient on no rank. ``used``: those that have one on this rank.
    Collective."""
    used_here = bytearray(count)
    for index in used:
        used_here[index] = 1
    maps = exchange_records(group, bytes(used_here), "used parameters")
    return {index for index in range(count) if not any(row[index] for row in maps)}
