"""A small allreduce by ``direct`` whose first messages carry the agreement check, or the other way round.

    up to EVERYTHING_BYTES    1  record + all numbers  to everyone      every rank adds all of them
    beyond                    1  record + part r       to rank r        rank r adds all parts r
                              2  the finished part r   to everyone

So a small allreduce takes one message time or two, not one more, and no schedule is walked. Its figures are in
docs/algorithms/direct.md. Rounding: contributions are added in rank order (16-bit ones in fp32), divided, and rounded
once.
"""

from __future__ import annotations

from ctypes import memmove
from typing import NamedTuple

import torch

from ... import native
from ...runtime.group import Group
from ...transport.base import RECORD_BYTES, Carried, Pending

EVERYTHING_BYTES = 4096
"""Up to here one message time counts for more than the bytes of sending everything to everyone."""


class Load(NamedTuple):
    """What travels with each record."""

    part_bytes: int
    to_each: bool
    """Every peer gets another part; otherwise everyone gets everything."""


def load_of(group: Group, numel: int, itemsize: int) -> Load | None:
    """What the records of an allreduce of ``numel`` numbers carry; None where they can't carry it."""
    room_bytes = group.transport.carries_bytes if group.agreement.required and group.window is None else 0
    if not room_bytes or not numel:
        return None
    if numel * itemsize <= EVERYTHING_BYTES:
        return Load(numel * itemsize, to_each=False)
    part_bytes = -(-numel // group.size) * itemsize
    return Load(part_bytes, to_each=True) if part_bytes <= room_bytes else None


def carry(tensor: torch.Tensor, load: Load) -> Carried:
    """``tensor`` (contiguous, CPU), ready to travel with the record."""
    return Carried(tensor.data_ptr(), tensor.numel() * tensor.element_size(), *load)


def allreduce(group: Group, tensor: torch.Tensor, carried: Carried, op: str, divisor: float) -> Pending:
    """Reduce ``tensor`` in place, once ``carried`` has arrived with records that agree."""
    itemsize, messages = tensor.element_size(), group.size - 1
    start_bytes, own_bytes = carried.part(group.rank) if carried.to_each else (0, carried.size_bytes)
    rows = carried.rows.view(tensor.dtype)
    native.reduce_rows(tensor, start_bytes // itemsize, rows, own_bytes // itemsize, op, divisor)
    if carried.to_each:
        messages *= 2
        finished = Carried(carried.address + start_bytes, own_bytes, carried.part_bytes, to_each=False)
        exchange = group.transport.exchange(bytes(RECORD_BYTES), finished)
        while not exchange.test():
            yield exchange
        for peer in range(group.size):
            start_bytes, part_bytes = carried.part(peer)
            memmove(carried.address + start_bytes, finished.rows.address + peer * finished.rows.row_bytes, part_bytes)
    group.messages_sent += messages
    group.bytes_sent += messages * carried.part_bytes
