"""What is ready on all ranks is carried out: fused into buffers in the window, on the operations of
:mod:`commlab.collectives`.

16-bit numbers are added in fp32, divided and rounded once. Small reductions of one kind and dtype share a buffer, small
moves an exchange; one large tensor in plain memory is reduced where it lies.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from .. import trace
from ..c10d.window_tensor import tensor_in
from ..chunks import Range, whole_at
from ..collectives.allreduce import allreduce_async
from ..collectives.delivery import bytes_of, deliver_async
from ..collectives.halves import gather_chunks_async, reduce_chunks_async
from ..runtime.agreement import Signature
from .adasum import adasum
from .announcement import dtype_of, summed_dtype
from .channel import Channel, Ready, Waits, until

_ALONE_BYTES = 1024 * 1024
"""From so many bytes on a tensor in plain memory is reduced where it lies."""
_HALVES = (torch.float16, torch.bfloat16)


def batches(channel: Channel, ready: Sequence[Ready]) -> list[list[Ready]]:
    """What is ready, in operations that are carried out together. The same on all ranks."""
    found: list[list[Ready]] = []
    open_batches: dict[Any, tuple[list[Ready], int]] = {}
    for each in ready:
        request = each.request
        key: Any = None
        if request.kind == "allreduce" and request.op != "adasum" and len(set(request.dtypes)) == 1:
            key = (request.kind, request.dtypes[0], request.op, request.scales)
        elif request.kind in ("allgather", "broadcast"):
            key = (request.kind, request.root)
        size_bytes = _size_bytes(each)
        batch, gathered = open_batches.get(key, ([], 0))
        if key is None or not batch or gathered + size_bytes > channel.settings.fusion_bytes:
            batch, gathered = [], 0
            found.append(batch)
        batch.append(each)
        open_batches[key] = batch, gathered + size_bytes
    return found


def _size_bytes(each: Ready) -> int:
    """As all ranks count it."""
    total = 0
    for request in each.requests.values() if each.request.kind == "allgather" else [each.request]:
        for dtype, shape in zip(request.dtypes, request.shapes, strict=True):
            total += dtype_of(dtype).itemsize * torch.Size(shape).numel()
    return total


def run(channel: Channel, batch: Sequence[Ready]) -> Waits:
    """Carry out one batch. Collective over the channel's ranks."""
    started_ns = time.perf_counter_ns()
    kind = batch[0].request.kind
    for each in batch:
        if each.entry is not None:
            each.entry.await_device()
    with torch.no_grad():
        if kind == "allreduce" and batch[0].request.op == "adasum":
            yield from _adasum(channel, batch[0])
        elif kind == "allreduce":
            for part in _of_one_dtype(batch):
                yield from _allreduce(channel, part)
        elif kind == "allgather":
            yield from _allgather(channel, batch)
        elif kind == "broadcast":
            yield from _broadcast(channel, batch)
        elif kind == "alltoall":
            yield from _alltoall(channel, batch[0])
        elif kind == "reducescatter":
            yield from _reducescatter(channel, batch[0])
    if trace.enabled():
        stopped_ns = time.perf_counter_ns()
        for each in batch:
            if each.entry is not None:
                lane = each.request.name
                trace.record(f"NEGOTIATE_{kind.upper()}", lane, each.entry.started_ns or started_ns, started_ns)
                trace.record(kind.upper(), lane, started_ns, stopped_ns, tensors=len(batch))


class _Part:
    """One tensor of a batch: ``source`` this rank's contribution (None: nothing), ``target`` where its result goes
    (None: nobody wants it)."""

    __slots__ = ("dtype", "numel", "shape", "source", "target")

    def __init__(self, each: Ready, index: int):
        self.dtype = dtype_of(each.request.dtypes[index])
        self.shape = torch.Size(each.request.shapes[index])
        self.numel = self.shape.numel()
        entry = each.entry
        self.source = entry.tensors[index].detach() if entry is not None and entry.tensors else None
        self.target = entry.outputs[index].detach() if entry is not None and entry.outputs else None


def _parts(batch: Sequence[Ready]) -> list[_Part]:
    return [_Part(each, index) for each in batch for index in range(len(each.request.shapes))]


def _of_one_dtype(batch: Sequence[Ready]) -> list[tuple[Ready, list[_Part]]]:
    """The batch's tensors by dtype; a grouped operation may have several."""
    found: dict[torch.dtype, list[_Part]] = {}
    for part in _parts(batch):
        found.setdefault(part.dtype, []).append(part)
    return [(batch[0], parts) for parts in found.values()]


def buffer_of(channel: Channel, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """``numel`` numbers, 1-D, in the window where there is one; the channel's own, used again by its next operation."""
    size_bytes = max(64, numel * dtype.itemsize)
    held = channel.buffers.get("fused")
    if held is None or held.numel() < size_bytes:
        window = channel.group.window
        room_bytes = 1 << (size_bytes - 1).bit_length()
        channel.buffers.clear()
        held = (
            torch.empty(room_bytes, dtype=torch.uint8) if window is None else tensor_in(window, room_bytes, torch.uint8)
        )
        channel.buffers["fused"] = held
    return held[: numel * dtype.itemsize].view(dtype)


def _units(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers in order, 1-D; complex ones as pairs."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.reshape(-1)


def _width(dtype: torch.dtype) -> int:
    return 2 if dtype.is_complex else 1


def _reduction(dtype: torch.dtype, op: str, scales: tuple[float, float]) -> tuple[torch.dtype, str]:
    """The dtype in which the numbers are reduced, and commlab's reduction."""
    summed = summed_dtype(dtype)
    assert summed is not None
    if dtype in _HALVES and scales != (1.0, 1.0):
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


def _allreduce(channel: Channel, batch: tuple[Ready, list[_Part]]) -> Waits:
    first, parts = batch
    op, scales, dtype = first.request.op, first.request.scales, parts[0].dtype
    summed, used_op = _reduction(dtype, op, scales)
    total = sum(part.numel for part in parts) * _width(dtype)
    alone = parts[0].target if len(parts) == 1 and summed is dtype else None
    if alone is not None and alone.is_cpu and alone.is_contiguous() and total * dtype.itemsize >= _ALONE_BYTES:
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
    if channel.group.size > 1 and total:
        yield from until(allreduce_async(numbers, used_op, group=channel.group))
    _after(channel, numbers, op, scales[1])
    if alone is None:
        _unpack(numbers, parts)


def _pack(numbers: torch.Tensor, parts: Sequence[_Part]) -> None:
    """Contributions into the buffer, one behind the other."""
    rooms = numbers.split([part.numel * _width(part.dtype) for part in parts])
    targets, sources = [], []
    for room, part in zip(rooms, parts, strict=True):
        if part.source is None:
            room.zero_()
        elif part.numel:
            targets.append(room)
            sources.append(_units(part.source))
    if targets:
        torch._foreach_copy_(targets, sources)


def _unpack(numbers: torch.Tensor, parts: Sequence[_Part]) -> None:
    """Results from the buffer to where they are wanted."""
    rooms = numbers.split([part.numel * _width(part.dtype) for part in parts])
    targets, sources = [], []
    for room, part in zip(rooms, parts, strict=True):
        target = part.target
        if target is None or not part.numel:
            continue
        if target.is_contiguous() and not target.is_inference() and not target.is_complex():
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


def _adasum(channel: Channel, ready: Ready) -> Waits:
    for part in _parts([ready]):
        wide = torch.float64 if part.dtype is torch.float64 else torch.float32
        numbers = torch.zeros(part.numel, dtype=wide)
        if part.source is not None:
            numbers.copy_(part.source.reshape(-1))
        _scale(numbers, ready.request.scales[0])
        yield from adasum(channel.group, numbers)
        _scale(numbers, ready.request.scales[1])
        if part.target is not None:
            put(part.target, numbers)


def _allgather(channel: Channel, batch: Sequence[Ready]) -> Waits:
    group = channel.group
    keys = [(each, index) for each in batch for index in range(len(each.request.shapes))]
    shapes = [[torch.Size(each.requests[peer].shapes[index]) for peer in range(group.size)] for each, index in keys]
    dtypes = [dtype_of(each.request.dtypes[index]) for each, index in keys]
    stream = []
    for each, index in keys:
        assert each.entry is not None, "ranks have not joined"
        stream.append(bytes_of(each.entry.tensors[index].detach().cpu().contiguous()))
    own_bytes = sum(piece.numel() for piece in stream)
    sizes = [
        [shape.numel() * dtype.itemsize for shape, dtype in zip(of_peer, dtypes, strict=True)]
        for of_peer in zip(*shapes, strict=True)
    ]
    wholes = []
    for (each, index), of_tensor, dtype in zip(keys, shapes, dtypes, strict=True):
        rows = sum(shape[0] for shape in of_tensor)
        wholes.append(torch.empty((rows, *each.request.shapes[index][1:]), dtype=dtype))
    if len(keys) == 1:
        outs = list(bytes_of(wholes[0]).split([of_peer[0] for of_peer in sizes]))
    else:
        outs = [torch.empty(sum(of_peer), dtype=torch.uint8) for of_peer in sizes]
    signature = Signature("horovod's allgather")
    yield from until(deliver_async(group, signature, stream, [Range(0, own_bytes)] * group.size, outs))
    if len(keys) > 1:
        pieces = [out.split(of_peer) for out, of_peer in zip(outs, sizes, strict=True)]
        for place, whole in enumerate(wholes):
            target, at = bytes_of(whole), 0
            for of_peer in pieces:
                target[at : at + of_peer[place].numel()].copy_(of_peer[place])
                at += of_peer[place].numel()
    done: dict[int, list[torch.Tensor]] = {}
    for (each, index), whole in zip(keys, wholes, strict=True):
        assert each.entry is not None
        done.setdefault(id(each), []).append(whole.to(each.entry.tensors[index].device))
    for each in batch:
        assert each.entry is not None
        each.entry.outputs = done[id(each)]


def _broadcast(channel: Channel, batch: Sequence[Ready]) -> Waits:
    group = channel.group
    root = channel.ranks.index(batch[0].request.root)
    parts = _parts(batch)
    sizes = [part.numel * part.dtype.itemsize for part in parts]
    total = sum(sizes)
    is_root = group.rank == root
    alone = parts[0].target if len(parts) == 1 else None
    if alone is not None and alone.is_cpu and alone.is_contiguous() and total >= _ALONE_BYTES:
        if is_root and parts[0].source is not None and parts[0].source.data_ptr() != alone.data_ptr():
            alone.copy_(parts[0].source)
        numbers = bytes_of(alone)
    else:
        alone = None
        numbers = buffer_of(channel, total, torch.uint8)
        if is_root:
            for room, part in zip(numbers.split(sizes), parts, strict=True):
                assert part.source is not None
                room.copy_(bytes_of(part.source.cpu().contiguous()))
    if group.size > 1 and total:
        yield from until(gather_chunks_async(numbers, whole_at(root, total, group.size), group=group))
    if alone is None:
        for room, part in zip(numbers.split(sizes), parts, strict=True):
            in_place = part.source is not None and part.target is not None and _same(part.source, part.target)
            if part.target is not None and part.numel and not (is_root and in_place):
                received = torch.empty(part.shape, dtype=part.dtype)
                bytes_of(received).copy_(room)
                with torch.inference_mode(part.target.is_inference()):
                    part.target.copy_(received)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.stride() == second.stride()


def _alltoall(channel: Channel, ready: Ready) -> Waits:
    group, entry = channel.group, ready.entry
    assert entry is not None, "ranks have not joined"
    tensor = entry.tensors[0]
    row_bytes = torch.Size(ready.request.shapes[0][1:]).numel() * tensor.element_size()
    received = [ready.requests[peer].splits[group.rank] for peer in range(group.size)]
    whole = torch.empty((sum(received), *tensor.shape[1:]), dtype=tensor.dtype)
    outs = (
        list(bytes_of(whole).split([rows * row_bytes for rows in received]))
        if whole.numel()
        else [torch.empty(0, dtype=torch.uint8) for _ in received]
    )
    ranges, start = [], 0
    for rows in ready.requests[group.rank].splits:
        ranges.append(Range(start * row_bytes, (start + rows) * row_bytes))
        start += rows
    stream = [bytes_of(tensor.detach().cpu().contiguous())]
    yield from until(deliver_async(group, Signature("horovod's alltoall"), stream, ranges, outs))
    entry.outputs = [whole.to(tensor.device), torch.tensor(received, dtype=torch.int32)]


def rows_of(rows: int, size: int) -> list[int]:
    """How many of ``rows`` each of ``size`` ranks gets of a reducescatter: the first ones get one more."""
    return [rows // size + (rank < rows % size) for rank in range(size)]


def _reducescatter(channel: Channel, ready: Ready) -> Waits:
    group, entry = channel.group, ready.entry
    op, scales = ready.request.op, ready.request.scales
    found = []
    for part in _parts([ready]):
        summed, used_op = _reduction(part.dtype, op, scales)
        row_numel = part.shape[1:].numel() * _width(part.dtype)
        mine = rows_of(part.shape[0], group.size)
        numbers = buffer_of(channel, part.numel * _width(part.dtype), summed)
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
        assert entry is not None and part.source is not None, "ranks have not joined"
        out = torch.empty((mine[group.rank], *part.shape[1:]), dtype=part.dtype, device=part.source.device)
        if out.numel():
            put(out, piece)
        found.append(out)
    if entry is not None:
        entry.outputs = found
