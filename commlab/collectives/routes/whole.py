"""Whole: a half of an allreduce, on few numbers over links, goes as a whole one, in the messages of the agreement check
(:mod:`.piggyback`).

    reduce, reduce_scatter    every rank has all sums, and keeps its own chunk
    broadcast, allgather      each rank gives its own bytes, and zeros in the place of all others': as integers they add
                              up to everybody's bytes

So small halves take what a small allreduce takes, one message time or two in one native call, and go by the nodes'
leaders as that does; no program is run behind an agreement check. Cost: twice the bytes of a half, or more, so only
while these take the network less time than is saved. Rounding: a reduction's is that of :mod:`.piggyback`, so sums of
16-bit numbers, which a half leaves unrounded, don't go so. When to use: ``auto`` does; docs/links.md has the figures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...chunks import Range
from ...native.dtypes import HALVES
from ...runtime.agreement import Signature
from ...runtime.group import Group
from ...transport.base import AtOnce, Offload, Pending, Piggyback
from ..plan import Call, Plan
from . import piggyback

CASTS = False
LAUNCHES = True

MOST_BYTES = 64 * 1024

SAVED_S = 60e-6
"""What is saved: an announcement of its own, and the steps of Python around it. Where all numbers to all peers take the
network longer, they go as a half: on 4 hosts at 10 Gbit/s 64 KB took 430 us so, and 270."""

_UNIT = torch.int64


class Whole(NamedTuple):
    """What is worked out once: the numbers of the allreduce."""

    numel: int
    dtype: torch.dtype
    load: piggyback.Load


def load_of(group: Group, kind: str, numel: int, dtype: torch.dtype) -> Whole | None:
    """How a half of ``kind`` on ``numel`` numbers goes as a whole; None where it doesn't."""
    size_bytes = numel * dtype.itemsize
    if not group.transport.moves_itself or not 0 < size_bytes <= MOST_BYTES:
        return None
    senders = group.size if group.leaders is None else group.leaders.nodes
    if size_bytes * (senders - 1) * group.byte_s > SAVED_S:
        return None
    if kind == "allgather":
        numel, dtype = -(-size_bytes // _UNIT.itemsize), _UNIT
    elif dtype in HALVES:
        return None
    load = piggyback.load_of(group, numel, dtype, "sum")
    return None if load is None else Whole(numel, dtype, load)


def at_once(group: Group, few: Whole, op: str) -> AtOnce | None:
    """The native call, on numbers that :func:`reduce_at_once` and :func:`gather_at_once` make."""
    return piggyback.at_once(group, few.load, few.numel, few.dtype, op)


def reduce_at_once(
    group: Group, signature: Signature, call: AtOnce, flat: torch.Tensor, out: torch.Tensor | None, own: Range
) -> bool:
    """The reduction in one native call, into ``out`` or this rank's chunk of ``flat``, which otherwise stays as it was;
    whether it was possible just now. If not, nothing was done."""
    sums = flat.clone()
    if not group.at_once(signature, call, sums, sums.data_ptr()):
        return False
    _write(flat[own.start : own.stop] if out is None else out, sums[own.start : own.stop])
    return True


def gather_at_once(
    group: Group, signature: Signature, call: AtOnce, few: Whole, flat: torch.Tensor, own: Range
) -> bool:
    """The same of a gather, in ``flat``."""
    added = _own_alone(few, flat, own)
    if not group.at_once(signature, call, added, added.data_ptr()):
        return False
    _write(flat, _bytes(added, flat))
    return True


def _write(target: torch.Tensor, numbers: torch.Tensor) -> None:
    if not target.numel():
        return  # autograd would take it for a write
    with torch.inference_mode(target.is_inference()):
        target.detach().copy_(numbers.view(target.shape))


def _own_alone(few: Whole, flat: torch.Tensor, own: Range) -> torch.Tensor:
    """This rank's chunk of ``flat``, and zeros, as integers."""
    made = torch.zeros(few.numel, dtype=_UNIT, device="cpu")
    _bytes(made, flat)[own.start : own.stop].copy_(flat[own.start : own.stop])
    return made


def _bytes(integers: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """Their memory as numbers of ``flat``'s dtype."""
    return integers.view(torch.uint8)[: flat.nbytes].view(flat.dtype)


def attach(call: Call) -> Piggyback | Offload:
    """The numbers, ready to travel with the record. Of a reduction in place: only this rank's chunk means anything
    afterwards."""
    few: Whole = call.plan.few
    gathers = call.plan.signature.kind == "allgather"
    numbers = _own_alone(few, call.flat, call.chunks[call.group.rank]) if gathers else call.flat
    plan = Plan(call.plan.chosen, piggyback, few.dtype, call.plan.signature, few.load)
    call.inner = Call(call.group, plan, numbers, call.operation)
    call.inner.awaited = call.awaited
    return piggyback.attach(call.inner)


def reduce_chunks(call: Call) -> Pending:
    """Once the exchange has brought everybody's numbers, add them up."""
    assert call.inner is not None
    yield from piggyback.allreduce(call.inner)


def gather_chunks(call: Call) -> Pending:
    """The same, and write the sums to where they belong."""
    assert call.inner is not None
    yield from piggyback.allreduce(call.inner)
    _write(call.flat, _bytes(call.inner.tensor, call.flat))
