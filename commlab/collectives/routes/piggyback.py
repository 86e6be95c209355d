"""Piggyback: the numbers of a small allreduce travel with the agreement check, in the messages of its records.

    up to everything_bytes()  1  record + all numbers  to everyone      every rank adds all of them
    beyond                    1  record + share r      to rank r        rank r adds all shares r
                              2  the finished share r  to everyone

So a small allreduce takes one message time or two, not one more, and no schedule is walked. Its figures are in
docs/algorithms/direct.md. Rounding: contributions are added in rank order (16-bit ones in fp32), divided, and rounded
once. Where several ranks share a node and links join the nodes, contributions are added node by node, and up to 64 KB
that the caller waits for go by the nodes' leaders (:mod:`commlab.runtime.leaders`), which gives the same bits.
"""

from __future__ import annotations

from ctypes import memmove
from functools import partial
from typing import Any, NamedTuple

import torch

from ... import native
from ...native.dtypes import DTYPES, HALVES, OP_CODES
from ...runtime import programs
from ...runtime.agreement import Signature
from ...runtime.group import Group
from ...runtime.leaders import LEADERS_BYTES, Leaders
from ...transport.base import RECORD_BYTES, AtOnce, Counts, Offload, Pending, Piggyback
from ..plan import Call, divided
from . import schedule

CASTS = False
LAUNCHES = True

EVERYTHING_BYTES = 4096
"""Up to here everything goes to everyone, however slow the network and however many the ranks."""

PAIR_BYTES = 2**20
"""Up to here two ranks give each other everything: no byte more than in shares, and one message time less. Beyond, a
part that has arrived is better added while the next one is on its way."""

MESSAGE_S = 30e-6
"""What a further message time costs: two system calls, a wake-up, and the way. The figures are in
docs/algorithms/direct.md."""


def everything_bytes(transport: Any, ranks: int) -> int:
    """Up to so many bytes each of ``ranks`` ranks sends all numbers to all others: while that takes the network less
    than :data:`MESSAGE_S` longer than shares do, which are n (P-1)(P-2)/P bytes fewer a rank."""
    if not transport.moves_itself:
        return EVERYTHING_BYTES
    if ranks == 2:
        return PAIR_BYTES
    most = int(MESSAGE_S / transport.byte_s * ranks / ((ranks - 1) * (ranks - 2)))
    room_bytes: int = transport.piggyback_bytes
    return max(EVERYTHING_BYTES, min(most, room_bytes))


class Load(NamedTuple):
    """What travels with each record."""

    share_bytes: int
    """How many bytes go to each peer."""
    to_each: bool
    """Whether every peer gets another share; otherwise everyone gets all numbers."""

    def messages(self, ranks: int) -> int:
        """How many one of ``ranks`` ranks sends."""
        return (ranks - 1) * (2 if self.to_each else 1)


def _load(transport: Any, numel: int, itemsize: int, ranks: int) -> Load:
    """How ``ranks`` ranks let each other have ``numel`` numbers of ``itemsize`` bytes each."""
    if numel * itemsize <= everything_bytes(transport, ranks):
        return Load(numel * itemsize, to_each=False)
    return Load(-(-numel // ranks) * itemsize, to_each=True)


def load_of(group: Group, numel: int, wire: torch.dtype, op: str) -> Load | None:
    """What the records of an allreduce of ``numel`` numbers of ``wire`` carry."""
    checked = group.agreement.required and group.window is None
    room_bytes = group.transport.piggyback_bytes if checked else 0
    if not room_bytes or not numel:
        return None
    load = _load(group.transport, numel, wire.itemsize, group.size)
    return load if not load.to_each or load.share_bytes <= room_bytes else None


def at_once(group: Group, few: Load, numel: int, wire: torch.dtype, op: str) -> AtOnce | None:
    """The native call of the links."""
    if not group.transport.moves_itself:
        return None
    divisor, reduction = divided(op, group.size)
    if group.leaders is not None and numel * wire.itemsize <= LEADERS_BYTES:
        return _by_leaders(group, group.leaders, few, numel, wire, reduction, divisor)
    arguments = numel, DTYPES[wire][0], OP_CODES[reduction], divisor, *few
    call, arguments = group.transport.few(*arguments)  # type: ignore[attr-defined]
    messages = few.messages(group.size)
    done = {0: Counts(messages * few.share_bytes, messages)}
    return AtOnce(call, arguments, partial(_resume, few), done)


def _by_leaders(
    group: Group, leaders: Leaders, few: Load, numel: int, wire: torch.dtype, op: str, divisor: float
) -> AtOnce:
    sums_bytes = 4 if wire in HALVES else wire.itemsize
    sums = _load(group.transport, numel, sums_bytes, leaders.nodes)
    arguments = numel, DTYPES[wire][0], OP_CODES[op], divisor, *sums
    messages = sums.messages(leaders.nodes) if leaders.leads else 0
    size_bytes = numel * wire.itemsize
    read_bytes = size_bytes * (leaders.node_size - 1 if leaders.leads else 1)
    written_bytes = size_bytes if leaders.node_size > 1 else 0
    counts = Counts(messages * sums.share_bytes, messages, read_bytes, written_bytes)
    resume = partial(leaders.resume, counts, partial(_long_way, few, op, divisor))
    return AtOnce(leaders.call, arguments, resume, {0: counts})


def _long_way(few: Load, op: str, divisor: float, group: Group, tensor: torch.Tensor) -> tuple[Pending, Offload]:
    launch = programs.few_launch(tensor.detach(), few, op, divisor, few.messages(group.size))
    launch.awaited = True
    return programs.finish(group, group.transport, launch), launch


def _resume(few: Load, group: Group, signature: Signature, sequence: int, tensor: torch.Tensor, left: Any) -> Pending:
    messages = few.messages(group.size)
    launch = Offload(None, tensor, None, few, messages * few.share_bytes, messages)
    launch.request = group.transport.resumed(left, tensor)  # type: ignore[attr-defined]
    body = programs.finish(group, group.transport, launch)
    return group.agreement.before(signature, sequence, body, lambda: launch)


def attach(call: Call) -> Piggyback | Offload:
    """The numbers, ready to travel with the record."""
    flat = call.flat
    if call.group.transport.moves_itself:
        few: Load = call.plan.few
        call.launch = programs.few_launch(flat, few, call.op, call.divisor, few.messages(call.group.size))
        call.launch.awaited = call.awaited
        return call.launch
    call.piggyback = Piggyback(flat.data_ptr(), flat.numel() * flat.element_size(), *call.plan.few)
    return call.piggyback


def allreduce(call: Call) -> Pending:
    """Reduce what has arrived with records that agree."""
    group, flat, piggyback = call.group, call.flat, call.piggyback
    if call.launch is not None:
        yield from programs.finish(group, group.transport, call.launch)
        return
    if piggyback is None:  # the agreement check has been turned off since the plan was made
        yield from schedule.allreduce(call)
        return
    itemsize = flat.element_size()
    start_bytes, own_bytes = piggyback.share(group.rank) if piggyback.to_each else (0, piggyback.size_bytes)
    rows = piggyback.rows.view(flat.dtype)
    native.reduce_rows(flat, start_bytes // itemsize, rows, own_bytes // itemsize, call.op, call.divisor)
    if piggyback.to_each:
        finished = Piggyback(piggyback.address + start_bytes, own_bytes, piggyback.share_bytes, to_each=False)
        exchange = group.transport.exchange(bytes(RECORD_BYTES), finished)
        while not exchange.test():
            yield exchange
        for peer in range(group.size):
            start_bytes, peer_bytes = piggyback.share(peer)
            row = finished.rows.address + peer * finished.rows.row_bytes
            memmove(piggyback.address + start_bytes, row, peer_bytes)
    messages = call.plan.few.messages(group.size)
    group.messages_sent += messages
    group.bytes_sent += messages * piggyback.share_bytes
