"""Inline: up to 64 KB travel in the window's control pages, beside the record of the agreement check. After one wait
every rank reduces all numbers by itself.

Cost of an allreduce of n elements: one wait; each rank reads P n elements and writes n. Nothing is sent. Rounding: all
contributions are added in rank order, in fp32 where they have 16 bits, divided, and rounded once. The shortest way of
all, :meth:`commlab.runtime.group.Group.at_once`, does in one native call what this file does in steps; where
a peer lets that call wait, the rest of the operation goes on here.
"""

from __future__ import annotations

from functools import partial

import torch

from ...native.dtypes import DTYPES, OP_CODES
from ...runtime.agreement import Signature
from ...runtime.group import Group
from ...transport.base import AtOnce, Counts, Pending
from ...window import loops
from ...window.exchange import Attachment
from ..plan import Call, divided

CASTS = False


def load_of(group: Group, numel: int, wire: torch.dtype, op: str) -> int | None:
    """The bytes of the numbers, where the control pages have room for them."""
    size_bytes = numel * wire.itemsize
    return size_bytes if group.window is not None and 0 < size_bytes <= loops.INLINE_BYTES else None


def at_once(group: Group, few: int, numel: int, wire: torch.dtype, op: str) -> AtOnce:
    """The native call of the window. ``few``: the bytes of the numbers."""
    assert group.window is not None
    divisor, reduction = divided(op, group.size)
    arguments = numel, DTYPES[wire][0], OP_CODES[reduction], divisor
    call, read_bytes = group.window.sync.allreduce_inline, few * group.size
    done = {0: Counts(0, 0, read_bytes, few)}
    return AtOnce(call, arguments, partial(_resume, reduction, divisor), done)


def _resume(
    op: str, divisor: float, group: Group, signature: Signature, sequence: int, tensor: torch.Tensor, left: object
) -> Pending:
    # The record is published.
    return group.agreement.before(signature, sequence, _reduce(group, tensor, op, divisor), lambda: None)


def attach(call: Call) -> Attachment:
    """The numbers themselves."""
    flat = call.flat
    return Attachment(address=flat.data_ptr(), size_bytes=flat.numel() * flat.element_size())


def allreduce(call: Call) -> Pending:
    """Reduce everything on every rank, out of the control pages."""
    return _reduce(call.group, call.flat, call.op, call.divisor)


def _reduce(group: Group, tensor: torch.Tensor, op: str, divisor: float) -> Pending:
    assert group.window is not None
    group.account(loops.reduce_inline(group.window, tensor.detach().view(-1), op, divisor))
    yield from ()  # the computation has nothing to wait for
