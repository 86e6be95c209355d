"""Schedule: the numbers travel in messages, by any algorithm of :mod:`commlab.schedules`; the executor runs the steps
in segments. Cost and rounding are the algorithm's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...chunks import Range
from ...runtime.execute import SEGMENT_BYTES, Execution
from ...runtime.group import Group
from ...runtime.operand import Operand, operand_of
from ...schedules import ALGORITHMS, compose
from ...transport.base import Pending
from ...window.exchange import NOTHING, Attachment
from ..plan import Call

CASTS = False

CHAIN_SEGMENT_BYTES = 128 * 1024
"""The least that a segment of a chain has: a message's own cost shows below."""


def reason_against(group: Group, kind: str) -> str:
    """Messages go everywhere."""
    return ""


def attach(call: Call) -> Attachment:
    """Nothing: the messages carry the numbers."""
    _ = call.flat  # a copy that can't be made is told before anything is sent
    return NOTHING


def allreduce(call: Call) -> Pending:
    """A reduce-scatter to the owners that suit the algorithm best, and an allgather from them."""
    group, flat, algorithm = call.group, call.flat, ALGORITHMS[call.plan.chosen]
    own = algorithm.owners(flat.numel(), group.size)[group.rank]
    operand = operand_of(flat, call.op, call.divisor, algorithm.MEETS_AT_OWNER, own)
    schedule = compose.allreduce(algorithm, group.rank, group.size, flat.numel())
    yield from group.execute(Execution(schedule, operand, group.transport))


def reduce_chunks(call: Call) -> Pending:
    """A reduce-scatter to the owners of ``call.chunks``."""
    group, flat, algorithm = call.group, call.flat, ALGORITHMS[call.plan.chosen]
    own = call.chunks[group.rank]
    operand = operand_of(flat, call.op, call.divisor, algorithm.MEETS_AT_OWNER, own, call.wide)
    schedule = compose.reduce_scatter(algorithm, group.rank, call.chunks)
    yield from group.execute(Execution(schedule, operand, group.transport, _segment_bytes(flat, call.chunks)))


def gather_chunks(call: Call) -> Pending:
    """An allgather from the owners of ``call.chunks``."""
    group, flat, algorithm = call.group, call.flat, ALGORITHMS[call.plan.chosen]
    schedule = compose.allgather(algorithm, group.rank, call.chunks)
    segment_bytes = _segment_bytes(flat, call.chunks)
    yield from group.execute(Execution(schedule, Operand(flat), group.transport, segment_bytes))


def _segment_bytes(flat: torch.Tensor, chunks: Sequence[Range]) -> int:
    """A chain of P ranks (ring, one rank owns everything) takes 1 + (P - 2) / segments times as long as its bytes: it
    wants many segments. Elsewhere all ranks have chunks under way from the start."""
    if all(chunk.numel < flat.numel() for chunk in chunks):
        return SEGMENT_BYTES
    return min(SEGMENT_BYTES, max(CHAIN_SEGMENT_BYTES, flat.numel() * flat.element_size() // 16))
