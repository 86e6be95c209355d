"""The two halves of an allreduce, on chunks of any size, one per rank: the parameter server's push and pull, and what
the other operations are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..chunks import Range
from ..native.dtypes import HALVES
from ..native.norm import Squares
from ..runtime.execute import SEGMENT_BYTES, Execution
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..runtime.operand import Operand, divided, operand_of
from ..runtime.world import resolve
from ..schedules import ALGORITHMS, compose
from ..transport.base import Pending
from ..window import loops
from .plan import plan_of
from .staging import place_of

CHAIN_SEGMENT_BYTES = 128 * 1024
"""The least that a segment of a chain has: a message's own cost shows below."""


def reduce_chunks_async(
    flat: torch.Tensor,
    chunks: Sequence[Range],
    op: str = "mean",
    name: str | None = None,
    algorithm: str = "auto",
    group: Group | None = None,
    squares: Squares | None = None,
) -> Handle:
    """Start to reduce rank r's chunk of ``flat`` on rank r, in place. ``flat``: 1-D, contiguous, CPU; afterwards only
    this rank's chunk means anything. The parameter server's push: with all of it in one chunk, a reduce to that rank.

    The handle returns this rank's chunk: a view of ``flat``, or for a 16-bit ``flat`` the fp32 sums that were never
    rounded (``direct``), so the whole push rounds once, when it was packed. ``squares``: is told the sum of squares of
    this rank's chunk where it is at hand, on all ranks or none.
    """
    group = resolve(group)
    chunks = tuple(chunks)
    chosen, _, signature, *_ = plan_of(group, "reduce_scatter", flat, op, name, algorithm, chunks=chunks)
    own = chunks[group.rank]
    wide = None
    if flat.dtype in HALVES and chosen in ("direct", "window") and group.size > 1:
        wide = torch.empty(own.numel, dtype=torch.float32)

    def body() -> Pending:
        if group.size == 1 or flat.numel() == 0:
            return
        if chosen == "window":
            divisor, reduction = divided(op, group.size)
            yield from loops.reduce_chunks(group, flat, chunks, reduction, divisor, wide, squares)
            return
        operand = operand_of(flat, op, chosen, group.size, own, wide)
        schedule = compose.reduce_scatter(ALGORITHMS[chosen], group.rank, chunks)
        yield from group.execute(Execution(schedule, operand, group.transport, _segment_bytes(flat, chunks)))

    result = flat[own.start : own.stop] if wide is None else wide
    return group.submit(signature, body(), result, lambda: place_of(group, flat, chosen))


def gather_chunks_async(
    flat: torch.Tensor,
    chunks: Sequence[Range],
    name: str | None = None,
    algorithm: str = "auto",
    group: Group | None = None,
) -> Handle:
    """Start to bring rank r's chunk of ``flat`` from rank r to all ranks, in place, for all r. ``flat``: 1-D,
    contiguous, CPU. The parameter server's pull: with all of it in one chunk, a broadcast."""
    group = resolve(group)
    chunks = tuple(chunks)
    chosen, _, signature, *_ = plan_of(group, "allgather", flat, "sum", name, algorithm, chunks=chunks)

    def body() -> Pending:
        if group.size == 1 or flat.numel() == 0:
            return
        if chosen == "window":
            yield from loops.gather_chunks(group, flat, chunks)
            return
        schedule = compose.allgather(ALGORITHMS[chosen], group.rank, chunks)
        yield from group.execute(Execution(schedule, Operand(flat), group.transport, _segment_bytes(flat, chunks)))

    return group.submit(signature, body(), flat, lambda: place_of(group, flat, chosen))


def _segment_bytes(flat: torch.Tensor, chunks: Sequence[Range]) -> int:
    """A chain of P ranks (ring, one rank owns everything) takes 1 + (P - 2) / segments times as long as its bytes: it
    wants many segments. Elsewhere all ranks have chunks under way from the start."""
    if all(chunk.numel < flat.numel() for chunk in chunks):
        return SEGMENT_BYTES
    return min(SEGMENT_BYTES, max(CHAIN_SEGMENT_BYTES, flat.numel() * flat.element_size() // 16))
