"""Window: on one node nobody sends. Every rank reduces its own shard straight out of everyone's memory.

Cost of an allreduce of n elements: two waits; each rank reads n and writes n elements of memory, whatever P, as a copy
does; ordinary data, but for a rank's own shard, cross the caches once more each way. Nothing is sent. Rounding: all
contributions are added in rank order, in fp32 where they have 16 bits, divided, and rounded once. The result is bitwise
the same on all ranks and from run to run. When to use: always, for ranks of one node (docs/window.md). The loops
themselves are in :mod:`commlab.window.loops`.
"""

from __future__ import annotations

from ...runtime.group import Group
from ...transport.base import Pending
from ...window import loops
from ...window.exchange import NOTHING, Attachment
from ...window.memory import Window
from ..plan import Call

CASTS = True


def reason_against(group: Group, kind: str) -> str:
    """Empty for a group whose ranks share memory."""
    return "" if group.window is not None else group.window_reason


def attach(call: Call) -> Attachment:
    """Where this rank's numbers lie in the window, if they do. If any rank's do not, all ranks' pass the staging
    areas."""
    window = _window(call)
    if not window.has_staging:
        window.make_staging()
    place = window.locate(call.flat)
    return NOTHING if place is None else Attachment(place.segment, place.offset)


def allreduce(call: Call) -> Pending:
    """Reduce this rank's shard out of all ranks' memory, into all ranks' memory."""
    window = _window(call)
    step = yield from loops.allreduce(window, call.flat, call.plan.wire, call.op, call.divisor, call.squares)
    call.group.account(step)


def reduce_chunks(call: Call) -> Pending:
    """Reduce this rank's chunk out of all ranks' memory."""
    step = yield from loops.reduce_chunks(
        _window(call), call.flat, call.chunks, call.op, call.divisor, call.wide, call.squares
    )
    call.group.account(step)


def gather_chunks(call: Call) -> Pending:
    """Copy all ranks' chunks."""
    step = yield from loops.gather_chunks(_window(call), call.flat, call.chunks)
    call.group.account(step)


def _window(call: Call) -> Window:
    assert call.group.window is not None
    return call.group.window
