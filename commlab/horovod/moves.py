"""What is ready and only moved: allgather, broadcast and alltoall of any dtype, several of a kind in one exchange."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..chunks import Range, whole_at
from ..collectives.delivery import bytes_of, deliver_async
from ..collectives.halves import gather_chunks_async
from ..runtime.agreement import Signature
from .announced import Ready
from .announcement import described
from .channel import Channel
from .parts import ALONE_BYTES, buffer_of, parts_of
from .tick import Waits, until


def allgather(channel: Channel, batch: Sequence[Ready]) -> Waits:
    group = channel.group
    keys = [(each, index) for each in batch for index in range(len(each.request.shapes))]
    shapes = [[_gathered(each, peer, index) for peer in range(group.size)] for each, index in keys]
    dtypes = [described(each.request.dtypes[index], each.request.shapes[index])[0] for each, index in keys]
    stream = []
    for each, index in keys:
        assert each.submission is not None, "ranks have not joined"
        if not each.submission.request.absent:
            stream.append(bytes_of(each.submission.tensors[index].detach().cpu().contiguous()))
    own_bytes = sum(piece.numel() for piece in stream)
    sizes = [
        [shape.numel() * dtype.itemsize for shape, dtype in zip(of_peer, dtypes, strict=True)]
        for of_peer in zip(*shapes, strict=True)
    ]
    wholes = []
    for (each, index), of_tensor, dtype in zip(keys, shapes, dtypes, strict=True):
        rows = sum(shape[0] for shape in of_tensor)
        wholes.append(torch.empty((rows, *each.request.shapes[index][1:]), dtype=dtype, device="cpu"))
    if len(keys) == 1:
        outs = list(bytes_of(wholes[0]).split([of_peer[0] for of_peer in sizes]))
    else:
        outs = [torch.empty(sum(of_peer), dtype=torch.uint8, device="cpu") for of_peer in sizes]
    signature = Signature("horovod's allgather")
    yield from until(deliver_async(group, signature, stream, [Range(0, own_bytes)] * group.size, outs))
    if len(keys) > 1:
        pieces = [out.split(of_peer) for out, of_peer in zip(outs, sizes, strict=True)]
        for index, whole in enumerate(wholes):
            target, at = bytes_of(whole), 0
            for of_peer in pieces:
                target[at : at + of_peer[index].numel()].copy_(of_peer[index])
                at += of_peer[index].numel()
    done: dict[int, list[torch.Tensor]] = {}
    for (each, index), whole in zip(keys, wholes, strict=True):
        assert each.submission is not None
        like = each.submission.tensors[index] if each.submission.tensors else each.submission.outputs[0]
        done.setdefault(id(each), []).append(whole.to(like.device))
    for each in batch:
        assert each.submission is not None
        each.submission.outputs = done[id(each)]


def _gathered(each: Ready, peer: int, index: int) -> torch.Size:
    """The shape of what a rank brings: no rows where it has nothing."""
    if each.requests[peer].absent:
        return torch.Size((0, *each.request.shapes[index][1:]))
    return torch.Size(each.requests[peer].shapes[index])


def broadcast(channel: Channel, batch: Sequence[Ready]) -> Waits:
    group = channel.group
    root = channel.ranks.index(batch[0].request.root)
    parts = parts_of(batch)
    sizes = [part.numel * part.dtype.itemsize for part in parts]
    total = sum(sizes)
    is_root = group.rank == root
    alone = parts[0].target if len(parts) == 1 else None
    if alone is not None and alone.is_cpu and alone.is_contiguous() and total >= ALONE_BYTES:
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
                received = torch.empty(part.shape, dtype=part.dtype, device="cpu")
                bytes_of(received).copy_(room)
                with torch.inference_mode(part.target.is_inference()):
                    part.target.copy_(received)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.stride() == second.stride()


def alltoall(channel: Channel, ready: Ready) -> Waits:
    group, submission = channel.group, ready.submission
    assert submission is not None, "ranks have not joined"
    tensor = submission.tensors[0]
    row_bytes = torch.Size(ready.request.shapes[0][1:]).numel() * tensor.element_size()
    received = [ready.requests[peer].splits[group.rank] for peer in range(group.size)]
    whole = torch.empty((sum(received), *tensor.shape[1:]), dtype=tensor.dtype, device="cpu")
    outs = (
        list(bytes_of(whole).split([rows * row_bytes for rows in received]))
        if whole.numel()
        else [torch.empty(0, dtype=torch.uint8, device="cpu") for _ in received]
    )
    ranges, start = [], 0
    for rows in ready.requests[group.rank].splits:
        ranges.append(Range(start * row_bytes, (start + rows) * row_bytes))
        start += rows
    stream = [bytes_of(tensor.detach().cpu().contiguous())]
    yield from until(deliver_async(group, Signature("horovod's alltoall"), stream, ranges, outs))
    submission.outputs = [whole.to(tensor.device), torch.tensor(received, dtype=torch.int32, device="cpu")]
