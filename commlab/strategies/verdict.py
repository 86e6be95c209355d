"""The verdict on a step's reduced gradient: all ranks must know it alike before one of them updates anything."""

from __future__ import annotations

import math
import struct
from functools import reduce
from operator import or_
from typing import NamedTuple

from ..runtime.control import exchange_records
from ..runtime.group import Group
from .start import Training

_OWN = struct.Struct("<d??QQ?HH")


class Verdict(NamedTuple):
    """What all ranks know of a step's reduced gradient."""

    squares: float
    """The sum of the squares of all numbers, times the square of the loss scale; 0 where nobody wants the norm."""
    finite: bool
    """Whether there is no inf or NaN in the reduced gradient, nor was in the numbers that any rank packed, nor in a
    loss that any rank has looked at."""
    unused: set[int]
    """Parameters (by index) without a gradient on any rank."""
    buffers: int = 0
    """The buffers that any rank has written since they were last alike, a bit for each
    (:class:`.buffers.Buffers`)."""
    written: bool = False
    """Whether any rank has written parameters, or put in another optimizer state, between the steps."""
    edits: tuple[int, ...] = ()
    """Of every rank: the digest of what its user has edited (:class:`.edits.Edits`)."""


def agree(training: Training, squares: float, finite: bool, used: set[int] | None, edits: int = 0) -> Verdict:
    """One small exchange: the squares, summed in rank order so that all ranks get the same bits, whether all gradients
    are finite, whether all ranks are in the same step and would update alike (:mod:`.record`), and whether any rank has
    unused parameters; if so, a second one finds those unused on all. Collective.

    ``squares``: of the numbers that this rank answers for; those of all ranks make up the whole. ``finite``: whether
    all that this rank has packed is. ``used``: which parameters (by index) have a gradient on this rank; None: all.
    ``edits``: a digest of what this rank's user has edited.
    DisagreementError, on all ranks, where they are not in the same step, or would not update alike.
    """
    group, record, count = training.group, training.record, len(training.parameters)
    finite = finite and math.isfinite(squares) and record.loss_is_finite()
    unused = set() if used is None else set(range(count)) - used
    if group.size == 1:
        return Verdict(squares, finite, unused, edits=(edits,))
    common = record.common(training.steps)
    buffers = training.buffers.written() if training.buffers.count else 0
    written = training.structure.was_written()
    own = _OWN.pack(squares, finite, bool(unused), edits, buffers, written, *record.passes())
    records = exchange_records(group, own + common, "step")
    rows = [_OWN.unpack_from(each) for each in records]
    all_squares, finites, some_unused, all_edits, all_buffers, any_written, *passes = zip(*rows, strict=True)
    odd = record.odd_ranks(list(zip(*passes, strict=True)))
    if odd or any(each[_OWN.size :] != common for each in records):
        record.require_alike([each[_OWN.size :] for each in records], odd)
    if any(some_unused):
        unused = unused_on_all(group, set(range(count)) if used is None else used, count)
    return Verdict(sum(all_squares), all(finites), unused, reduce(or_, all_buffers), any(any_written), all_edits)


def unused_on_all(group: Group, used: set[int], count: int) -> set[int]:
    """Which of ``count`` parameters (by index) have a gradient on no rank. ``used``: those that have one on this rank.
    Collective."""
    used_here = bytearray(count)
    for index in used:
        used_here[index] = 1
    maps = exchange_records(group, bytes(used_here), "used parameters")
    return {index for index in range(count) if not any(row[index] for row in maps)}
