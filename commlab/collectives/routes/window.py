"""Window: on one node nobody sends. Every rank reduces its own shard straight out of everyone's memory.

Cost of an allreduce of n elements: two waits; each rank reads n and writes n elements of memory, whatever P, as a copy
does; ordinary data, but for a rank's own shard, cross the caches once more each way. Nothing is sent. Rounding: all
contributions are added in rank order, in fp32 where they have 16 bits, divided, and rounded once. The result is bitwise
the same on all ranks and from run to run. When to use: always, for ranks of one node (docs/window.md). The loops
themselves are in :mod:`commlab.window.loops`.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from ...errors import SharedMemoryError
from ...runtime.agreement import Signature
from ...runtime.group import Group
from ...transport.base import AtOnce, Counts, Pending
from ...window import loops
from ...window.exchange import NOTHING, Attachment
from ..plan import Call, Chunks, divided

CASTS = True
_MOVES: Final[dict[str, loops.Moves]] = {"allreduce": "allreduce", "reduce_scatter": "reduce", "allgather": "gather"}


def reason_against(group: Group, kind: str) -> str:
    """Empty for a group whose ranks share memory."""
    return "" if group.window is not None else group.window_reason


def prepared(
    group: Group, kind: str, dtype: torch.dtype, wire: torch.dtype, numel: int, op: str, chunks: Chunks | None
) -> loops.Collective:
    """The operation as native code does it."""
    assert group.window is not None
    divisor, reduction = divided(op, group.size)
    cut = chunks or loops.aligned_split(numel, group.size, dtype.itemsize)
    return loops.Collective(group.window, _MOVES[kind], dtype, wire, reduction, divisor, cut, group.crowded)


def at_once(collective: loops.Collective) -> AtOnce | None:
    """The native call of the window; one more argument is the address where a reduction alone leaves its chunk, 0: in
    place."""
    try:
        collective.window.make_staging()
    except SharedMemoryError:
        return None  # the long way tells all ranks of it
    done = {
        way: Counts(node_bytes_read=step.bytes_read, node_bytes_written=step.bytes_written)
        for way, step in collective.steps.items()
    }
    return AtOnce(collective.native.call, (), partial(_resume, collective), done)


def _resume(
    collective: loops.Collective,
    group: Group,
    signature: Signature,
    sequence: int,
    kept: tuple[torch.Tensor, torch.Tensor | None],
    left: int,
) -> Pending:
    if left == collective.native.UNDER_WAY:
        yield from _counted(group, collective.go_on())
        return
    flat, out = kept
    # The record is published, and the numbers or their place with it.
    rest = _counted(group, collective.run(flat.detach().view(-1), out))
    yield from group.agreement.before(signature, sequence, rest, lambda: None)


def _counted(group: Group, loop: loops.Loop) -> Pending:
    group.account((yield from loop))


def attach(call: Call) -> Attachment:
    """Where this rank's numbers lie in the window, if they do; else they may lie in a room. If only some ranks' do, all
    ranks' pass the staging areas."""
    collective, flat = call.plan.shared, call.flat
    if collective is None:
        return NOTHING  # there are no numbers
    collective.window.make_staging()
    announced: Attachment = collective.announced(flat)
    return announced


def allreduce(call: Call) -> Pending:
    """Reduce this rank's shard out of all ranks' memory, into all ranks' memory."""
    return _counted(call.group, call.plan.shared.run(call.flat, call.wide, call.squares))


reduce_chunks = gather_chunks = allreduce
"""As the kind of the call says: out of all ranks' memory, into this rank's."""
