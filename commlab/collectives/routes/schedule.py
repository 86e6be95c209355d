"""Schedule: the numbers travel in messages, by any algorithm of :mod:`commlab.schedules`. The executor runs the steps
in segments; where the transport moves operations by itself (links), they are compiled to a program. Cost and rounding
are the algorithm's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...chunks import EMPTY, Range
from ...runtime import programs
from ...runtime.execute import SEGMENT_BYTES, Execution
from ...runtime.group import Group
from ...runtime.operand import Operand, operand_of
from ...schedules import ALGORITHMS, compose
from ...schedules.step import Schedule
from ...transport.base import Offload, Pending
from ...window.exchange import NOTHING, Attachment
from ..plan import Call

CASTS = False
LAUNCHES = True

CHAIN_SEGMENT_BYTES = 128 * 1024
"""The least that a segment of a chain has: a message's own cost shows below."""


def reason_against(group: Group, kind: str) -> str:
    """Messages go everywhere."""
    return ""


def attach(call: Call) -> Attachment | Offload:
    """The whole operation, where the transport moves it by itself; else nothing: the messages carry the numbers."""
    _ = call.flat  # a copy that can't be made is told before anything is sent
    if not call.plan.launches(call.group):
        return NOTHING
    call.launch = _launch(call)
    call.launch.awaited = call.awaited
    return call.launch


def _launch(call: Call) -> Offload:
    """The operation as a program."""
    group, flat, chosen, chunks = call.group, call.flat, call.plan.chosen, call.chunks
    algorithm, kind, rank, size = ALGORITHMS[chosen], call.plan.signature.kind, call.group.rank, call.group.size

    def schedule() -> Schedule:
        if kind == "allreduce":
            return compose.allreduce(algorithm, rank, size, flat.numel())
        half = compose.reduce_scatter if kind == "reduce_scatter" else compose.allgather
        return half(algorithm, rank, chunks)

    if kind == "allgather":
        operand = programs.native_operand(flat, "sum", 1, False, EMPTY)
    else:
        own = (chunks or algorithm.owners(flat.numel(), size))[rank]
        operand = programs.native_operand(flat, call.op, call.divisor, algorithm.MEETS_AT_OWNER, own, call.wide)
    segment_bytes = programs.SEGMENT_BYTES
    if chunks:
        segment_bytes = min(segment_bytes, _segment_bytes(flat, chunks))
    return programs.program_launch(group.transport, (chosen, kind, chunks), schedule, flat, operand, segment_bytes)


def _launched(call: Call) -> Pending:
    """Go on once the transport has moved everything."""
    yield from programs.finish(call.group, call.group.transport, call.launch or _launch(call))


def allreduce(call: Call) -> Pending:
    """A reduce-scatter to the owners that suit the algorithm best, and an allgather from them."""
    group, flat, algorithm = call.group, call.flat, ALGORITHMS[call.plan.chosen]
    if group.transport.moves_itself:
        yield from _launched(call)
        return
    own = algorithm.owners(flat.numel(), group.size)[group.rank]
    operand = operand_of(flat, call.op, call.divisor, algorithm.MEETS_AT_OWNER, own)
    schedule = compose.allreduce(algorithm, group.rank, group.size, flat.numel())
    yield from group.execute(Execution(schedule, operand, group.transport))


def reduce_chunks(call: Call) -> Pending:
    """A reduce-scatter to the owners of ``call.chunks``."""
    group, flat, algorithm = call.group, call.flat, ALGORITHMS[call.plan.chosen]
    if group.transport.moves_itself:
        yield from _launched(call)
        return
    own = call.chunks[group.rank]
    operand = operand_of(flat, call.op, call.divisor, algorithm.MEETS_AT_OWNER, own, call.wide)
    schedule = compose.reduce_scatter(algorithm, group.rank, call.chunks)
    yield from group.execute(Execution(schedule, operand, group.transport, _segment_bytes(flat, call.chunks)))


def gather_chunks(call: Call) -> Pending:
    """An allgather from the owners of ``call.chunks``."""
    group, flat, algorithm = call.group, call.flat, ALGORITHMS[call.plan.chosen]
    if group.transport.moves_itself:
        yield from _launched(call)
        return
    schedule = compose.allgather(algorithm, group.rank, call.chunks)
    segment_bytes = _segment_bytes(flat, call.chunks)
    yield from group.execute(Execution(schedule, Operand(flat), group.transport, segment_bytes))


def _segment_bytes(flat: torch.Tensor, chunks: Sequence[Range]) -> int:
    """A chain of P ranks (ring, one rank owns everything) takes 1 + (P - 2) / segments times as long as its bytes: it
    wants many segments. Elsewhere all ranks have chunks under way from the start."""
    if all(chunk.numel < flat.numel() for chunk in chunks):
        return SEGMENT_BYTES
    return min(SEGMENT_BYTES, max(CHAIN_SEGMENT_BYTES, flat.numel() * flat.element_size() // 16))
