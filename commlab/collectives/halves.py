"""The two halves of an allreduce, on chunks of any size, one per rank: the parameter server's push and pull, and what
the other operations are made of. For callers that wait each half is one native call, where its route has such."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch

from ..chunks import EMPTY, Range
from ..native.dtypes import HALVES
from ..native.norm import Squares
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..schedules import ALGORITHMS
from ..transport.base import Pending
from .plan import Call, Plan, plan_of


def reduce_at_once(
    tensor: torch.Tensor,
    out: torch.Tensor | None,
    chunks: Sequence[Range],
    op: str,
    name: str | None,
    algorithm: str,
    group: Group,
) -> Short | None:
    """The reduction of rank r's chunk of ``tensor`` on rank r, into ``out``, of the same dtype, or in place where that
    is None. ``tensor`` is left as it was but for that. None where it takes more than one native call."""
    if not (tensor.is_cpu and tensor.is_contiguous()):
        return None
    flat = tensor.view(-1)
    plan = plan_of(group, "reduce_scatter", flat, op, name, algorithm, chunks=tuple(chunks))
    own = chunks[group.rank]
    if plan.few is not None and plan.at_once is not None:
        return partial(plan.route.reduce_at_once, group, plan.signature, plan.at_once, flat, out, own)
    return _short(plan, group, flat, out, own)


def gather_at_once(
    flat: torch.Tensor, chunks: Sequence[Range], name: str | None, algorithm: str, group: Group, meaning: str
) -> Short | None:
    """:func:`gather_chunks_async` in one native call; None where it takes more."""
    plan = plan_of(group, "allgather", flat, "sum", name, algorithm, chunks=tuple(chunks), meaning=meaning)
    if plan.few is not None and plan.at_once is not None:
        own = chunks[group.rank]
        return partial(plan.route.gather_at_once, group, plan.signature, plan.at_once, plan.few, flat, own)
    return _short(plan, group, flat, None, EMPTY)


Short: TypeAlias = Callable[[], bool]
"""An operation as one native call; says whether it was possible just now. If not, nothing was done."""


def _short(plan: Plan, group: Group, flat: torch.Tensor, out: torch.Tensor | None, own: Range) -> Short | None:
    """``own``: this rank's chunk."""
    if plan.at_once is None:
        return None
    start = flat.data_ptr()
    if out is None:
        return partial(group.at_once, plan.signature, plan.at_once, (flat, None), start, 0)
    if not (out.is_cpu and out.is_contiguous()):
        return None
    # Numbers that were not read yet must not be written; but for those that are read where they are written.
    first = out.data_ptr()
    overlaps = first < start + flat.nbytes and start < first + out.nbytes
    if overlaps and first != start + own.start * flat.element_size():
        return None
    return partial(group.at_once, plan.signature, plan.at_once, (flat, out), start, first)


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
    call.awaited = awaited

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
    call.awaited = awaited

    def body() -> Pending:
        if group.size > 1 and flat.numel():
            yield from plan.route.gather_chunks(call)

    attach, launches = partial(plan.route.attach, call), plan.launches(group)
    return group.submit(plan.signature, body(), flat, attach, awaited, launches)
