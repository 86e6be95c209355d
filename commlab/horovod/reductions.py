"""Reductions of what is ready: 16-bit numbers are added in fp32, divided and rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..chunks import Range
from ..collectives.allreduce import allreduce_async
from ..collectives.halves import reduce_chunks_async
from ..native.dtypes import HALVES
from .adasum import adasum
from .announced import Ready
from .announcement import summed_dtype
from .channel import Channel
from .foreseen import Promise
from .parts import ALONE_BYTES, Part, buffer_of, parts_of, units_of, width_of
from .tick import Waits, until


def _reduction(dtype: torch.dtype, op: str, scales: tuple[float, float]) -> tuple[torch.dtype, str]:
    """The dtype in which the numbers are reduced, and commlab's reduction."""
    summed = summed_dtype(dtype)
    assert summed is not None
    if dtype in HALVES and scales != (1.0, 1.0):
        summed = torch.float32  # scaled and rounded once
    if dtype is torch.bool:
        op = {"sum": "max", "prod": "min"}.get(op, op)
    if op == "mean" and not summed.is_floating_point:
        op = "sum"  # divided afterwards
    return summed, op


def _scale(numbers: torch.Tensor, factor: float) -> None:
    if factor != 1.0:
        if numbers.is_floating_point():
            numbers.mul_(factor)
        else:
            numbers.copy_(numbers.double().mul_(factor))


def _after(channel: Channel, numbers: torch.Tensor, op: str, scale: float) -> None:
    """What remains to be done with reduced numbers. Integers of a mean are cut, as Horovod's are."""
    if numbers.is_floating_point():
        _scale(numbers, scale)
        return
    factor = scale / channel.group.size if op == "mean" else scale
    if op == "mean" and scale == 1.0:
        numbers.div_(channel.group.size, rounding_mode="trunc")
    else:
        _scale(numbers, factor)


def allreduce(channel: Channel, batch: tuple[Ready, list[Part]], promise: Promise | None = None) -> Waits:
    first, parts = batch
    op, scales, dtype = first.request.op, first.request.scales, parts[0].dtype
    summed, used_op = _reduction(dtype, op, scales)
    total = sum(part.numel for part in parts) * width_of(dtype)
    alone = parts[0].target if len(parts) == 1 and summed is dtype else None
    if alone is not None and alone.is_cpu and alone.is_contiguous() and total * dtype.itemsize >= ALONE_BYTES:
        numbers = alone.view(-1)
        source = parts[0].source
        if source is None:
            numbers.zero_()
        elif source.data_ptr() != alone.data_ptr() or not source.is_contiguous():
            alone.copy_(source)
    else:
        alone = None
        numbers = buffer_of(channel, total, summed)
        _pack(numbers, parts)
    _scale(numbers, scales[0])
    if channel.group.size > 1 and (total or promise is not None):
        yield from _reduce(channel, numbers, used_op, promise)
    _after(channel, numbers, op, scales[1])
    if alone is None:
        _unpack(numbers, parts)


def _reduce(channel: Channel, numbers: torch.Tensor, op: str, promise: Promise | None) -> Waits:
    name = None if promise is None else promise.name()
    yield from until(allreduce_async(numbers, op, name, group=channel.group))
    if promise is not None:
        promise.kept = True


def plain_tensors(promise: Promise) -> list[torch.Tensor] | None:
    """The tensors of a foreseen batch, where all of them are reduced in place and lie as the buffer wants them, which a
    step's gradients do; else None."""
    found = []
    for submission in promise.submissions:
        if len(submission.tensors) != 1 or submission.outputs[0] is not submission.tensors[0]:
            return None
        tensor = submission.tensors[0]
        plain = tensor.dtype in (torch.float32, torch.float64) and tensor.is_cpu and tensor.is_contiguous()
        if not plain or tensor.is_inference() or tensor.is_neg():
            return None
        found.append(tensor.detach())
    alone = len(found) == 1 and found[0].nbytes >= ALONE_BYTES
    return None if alone else found


def allreduce_in_place(channel: Channel, promise: Promise, tensors: list[torch.Tensor]) -> Waits:
    """The allreduce of a foreseen batch of :func:`plain_tensors`: as :func:`allreduce`, with nothing worked out
    twice."""
    request, batch = promise.submissions[0].request, promise.batch
    total, dtype = sum(tensor.numel() for tensor in tensors), tensors[0].dtype
    numbers = buffer_of(channel, total, dtype)
    if batch.rooms is None or batch.rooms[0].data_ptr() != numbers.data_ptr():
        rooms = numbers.split([tensor.numel() for tensor in tensors])
        batch.rooms = [room.view(tensor.shape) for room, tensor in zip(rooms, tensors, strict=True)]
    torch._foreach_copy_(batch.rooms, tensors)
    yield from _reduce(channel, numbers, _reduction(dtype, request.op, request.scales)[1], promise)
    _after(channel, numbers, request.op, request.scales[1])
    torch._foreach_copy_(tensors, batch.rooms)


def _pack(numbers: torch.Tensor, parts: Sequence[Part]) -> None:
    """Contributions into the buffer, one behind the other."""
    rooms = numbers.split([part.numel * width_of(part.dtype) for part in parts])
    targets, sources = [], []
    for room, part in zip(rooms, parts, strict=True):
        if part.source is None:
            room.zero_()
        elif part.numel:
            targets.append(room)
            sources.append(units_of(part.source))
    if targets:
        torch._foreach_copy_(targets, sources)


def _unpack(numbers: torch.Tensor, parts: Sequence[Part]) -> None:
    """Results from the buffer to where they are wanted."""
    rooms = numbers.split([part.numel * width_of(part.dtype) for part in parts])
    targets, sources = [], []
    for room, part in zip(rooms, parts, strict=True):
        target = part.target
        if target is None or not part.numel:
            continue
        if target.is_contiguous() and not (target.is_inference() or target.is_complex() or target.is_neg()):
            targets.append(target.view(-1))
            sources.append(room)
        else:
            put(target, room)
    if targets:
        torch._foreach_copy_(targets, sources)


def put(target: torch.Tensor, numbers: torch.Tensor) -> None:
    """Write ``numbers``, in order, into a tensor that may lie anyhow."""
    if target.is_complex():
        numbers = torch.view_as_complex(numbers.reshape(*target.shape, 2))
    with torch.inference_mode(target.is_inference()):
        target.copy_(numbers.view(target.shape))


def combine(channel: Channel, ready: Ready) -> Waits:
    for part in parts_of([ready]):
        wide = torch.float64 if part.dtype is torch.float64 else torch.float32
        numbers = torch.zeros(part.numel, dtype=wide, device="cpu")
        if part.source is not None:
            numbers.copy_(part.source.reshape(-1))
        _scale(numbers, ready.request.scales[0])
        yield from adasum(channel.group, numbers)
        _scale(numbers, ready.request.scales[1])
        if part.target is not None:
            put(part.target, numbers)


def rows_of(rows: int, size: int) -> list[int]:
    """How many of ``rows`` each of ``size`` ranks gets of a reducescatter: the first ones get one more."""
    return [rows // size + (rank < rows % size) for rank in range(size)]


def reducescatter(channel: Channel, ready: Ready) -> Waits:
    group, submission = channel.group, ready.submission
    op, scales = ready.request.op, ready.request.scales
    found = []
    for part in parts_of([ready]):
        summed, used_op = _reduction(part.dtype, op, scales)
        row_numel = part.shape[1:].numel() * width_of(part.dtype)
        mine = rows_of(part.shape[0], group.size)
        numbers = buffer_of(channel, part.numel * width_of(part.dtype), summed)
        _pack(numbers, [part])
        _scale(numbers, scales[0])
        chunks, start = [], 0
        for rows in mine:
            chunks.append(Range(start, start + rows * row_numel))
            start += rows * row_numel
        piece = numbers
        if group.size > 1:
            handle = reduce_chunks_async(numbers, chunks, used_op, group=group)
            yield from until(handle)
            piece = handle.result
        _after(channel, piece, op, scales[1])
        assert submission is not None and part.source is not None, "ranks have not joined"
        out = torch.empty((mine[group.rank], *part.shape[1:]), dtype=part.dtype, device=part.source.device)
        if out.numel():
            put(out, piece)
        found.append(out)
    if submission is not None:
        submission.outputs = found
