"""The two halves of an allreduce, on chunks of any size, one per rank: the parameter server's push and pull, and what
the other operations are made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ..chunks import Range
from ..native.dtypes import HALVES
from ..native.norm import Squares
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..schedules import ALGORITHMS
from ..transport.base import Pending
from .plan import Call, plan_of


def reduce_chunks_async(
    flat: torch.Tensor,
    chunks: Sequence[Range],
    op: str = "mean",
    name: str | None = None,
    algorithm: str = "auto",
    *,
    group: Group,
    squares: Squares | None = None,
    awaited: bool = False,
) -> Handle:
    """Start to reduce rank r's chunk of ``flat`` on rank r, in place. ``flat``: 1-D, contiguous, CPU; afterwards only
    this rank's chunk means anything. The parameter server's push: with everything in one chunk, a reduce to that rank.

    The handle returns this rank's chunk: a view of ``flat``, or for a 16-bit ``flat`` the fp32 sums that were never
    rounded (``direct``), so the whole push rounds once, when it was packed. ``squares``: is given the sum of squares of
    this rank's chunk where they are at hand, on all ranks or none. ``awaited``: the caller waits for it at once.
    """
    chunks = tuple(chunks)
    plan = plan_of(group, "reduce_scatter", flat, op, name, algorithm, chunks=chunks)
    own = chunks[group.rank]
    wide = None
    meets_at_owner = plan.chosen not in ALGORITHMS or ALGORITHMS[plan.chosen].MEETS_AT_OWNER
    if flat.dtype in HALVES and meets_at_owner and group.size > 1:
        wide = torch.empty(own.numel, dtype=torch.float32, device="cpu")
    call = Call(group, plan, flat, op, chunks, squares, wide)

    def body() -> Pending:
        if group.size > 1 and flat.numel():
            yield from plan.route.reduce_chunks(call)

    result = flat[own.start : own.stop] if wide is None else wide
    attach, launches = partial(plan.route.attach, call), plan.launches(group)
    return group.submit(plan.signature, body(), result, attach, awaited, launches)


def gather_chunks_async(
    flat: torch.Tensor,
    chunks: Sequence[Range],
    name: str | None = None,
    algorithm: str = "auto",
    *,
    group: Group,
    meaning: str = "",
    awaited: bool = False,
) -> Handle:
    """Start to bring rank r's chunk of ``flat`` from rank r to all ranks, in place, for all r. ``flat``: 1-D,
    contiguous, CPU; uint8 too. The parameter server's pull: with everything in one chunk, a broadcast. ``meaning``:
    what else ranks must agree on, of bytes that stand for other numbers. ``awaited``: the caller waits for it at
    once."""
    chunks = tuple(chunks)
    plan = plan_of(group, "allgather", flat, "sum", name, algorithm, chunks=chunks, meaning=meaning)
    call = Call(group, plan, flat, "sum", chunks)

    def body() -> Pending:
        if group.size > 1 and flat.numel():
            yield from plan.route.gather_chunks(call)

    attach, launches = partial(plan.route.attach, call), plan.launches(group)
    return group.submit(plan.signature, body(), flat, attach, awaited, launches)
