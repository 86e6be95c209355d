"""Inline: up to 64 KB travel in the window's control pages, beside the record of the agreement check. After one wait
every rank reduces all numbers by itself.

Cost of an allreduce of n elements: one wait; each rank reads P n elements and writes n. Nothing is sent. Rounding: all
contributions are added in rank order, in fp32 where they have 16 bits, divided, and rounded once. The shortest way of
all, :meth:`commlab.runtime.group.Group.allreduce_inline`, does in one native call what this file does in steps; where a
peer lets that call wait, the rest of the operation goes on here.
"""

from __future__ import annotations

import torch

from ...native.dtypes import DTYPES, OP_CODES
from ...runtime.group import Group
from ...transport.base import Pending
from ...window import loops
from ...window.exchange import Attachment, Inline
from ..plan import Call, divided

CASTS = False


def load_of(group: Group, numel: int, wire: torch.dtype, op: str) -> Inline | None:
    """What the native call has to know."""
    if group.window is None or not 0 < numel * wire.itemsize <= loops.INLINE_BYTES:
        return None
    divisor, reduction = divided(op, group.size)
    return Inline((numel, DTYPES[wire][0], OP_CODES[reduction], divisor), numel * wire.itemsize)


def attach(call: Call) -> Attachment:
    """The numbers themselves."""
    flat = call.flat
    return Attachment(address=flat.data_ptr(), size_bytes=flat.numel() * flat.element_size())


def allreduce(call: Call) -> Pending:
    """Reduce everything on every rank, out of the control pages."""
    group = call.group
    assert group.window is not None
    group.account(loops.reduce_inline(group.window, call.flat.detach().view(-1), call.op, call.divisor))
    yield from ()  # the computation has nothing to wait for
