"""The collectives of torch.distributed that move numbers, by commlab's: each function returns the work, or None where
the operation is left to gloo (:mod:`.fallback`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from ..chunks import Range, adjoining, whole_at
from ..collectives.delivery import WholeDelivery, bytes_of, deliver_async, deliver_at_once, in_window
from ..collectives.halves import gather_at_once, gather_chunks_async
from ..collectives.plan import remember
from ..native.versions import count_write
from ..runtime.agreement import Signature
from .members import Members, Work, WorkToBe
from .tensors import Tensors, aligned, as_moved, flat_of, movable, require, room_for, write, write_all
from .work import CommlabWork


def broadcast(pg: Members, tensors: Tensors, root: int, awaited: bool) -> Work:
    if len(tensors) != 1 or not movable(tensors[0]):
        return None
    tensor, span = tensors[0], pg.begin("broadcast", tensors)
    if pg.rank() != root:
        count_write(tensors)
    flat = aligned(flat_of(tensor))
    after = None if flat.data_ptr() == tensor.data_ptr() else (lambda: write(tensor, flat))
    to_be = WorkToBe(list(tensors), after, span, awaited)
    moved = as_moved(flat, flat.numel(), pg.group)
    if moved is None:
        size_bytes = flat.numel() * flat.element_size()
        mine = Range(0, size_bytes if pg.rank() == root else 0)
        outs = [bytes_of(flat) if rank == root else _NO_BYTES for rank in range(pg.size())]
        detail = f"{size_bytes} bytes, root {root}"
        return _delivered(pg, "broadcast", detail, [bytes_of(flat)], [mine] * pg.size(), outs, to_be)
    return _gathered(pg, moved, whole_at(root, moved.numel(), pg.size()), to_be)


def _gathered(pg: Members, whole: torch.Tensor, chunks: Sequence[Range], to_be: WorkToBe) -> CommlabWork:
    """Rank r's chunk of ``whole`` from rank r to all ranks."""
    if to_be.at_once:
        short = gather_at_once(whole, chunks, None, "auto", pg.group, "")
        if short is not None and short():
            return to_be.over(pg)
    return to_be.of(pg, gather_chunks_async(whole, chunks, group=pg.group))


_NO_BYTES: Final = torch.empty(0, dtype=torch.uint8, device="cpu")


def _delivered(
    pg: Members, kind: str, detail: str, stream: Tensors, ranges: Sequence[Range], outs: Tensors, to_be: WorkToBe
) -> CommlabWork:
    signature = Signature(kind, detail=detail)
    if to_be.at_once and deliver_at_once(pg.group, signature, stream, ranges, outs):
        return to_be.over(pg)
    return to_be.of(pg, deliver_async(pg.group, signature, stream, ranges, outs))


def allgather_single(pg: Members, out: torch.Tensor, tensor: torch.Tensor, awaited: bool) -> Work:
    if not movable(out) or not movable(tensor) or out.dtype is not tensor.dtype:
        return None
    size, flat = pg.size(), flat_of(tensor)
    count_write((out,))
    whole = aligned(flat_of(out))
    require(pg.rank(), size, "all_gather", whole.numel() == size * flat.numel(), tensor, [out], [flat.numel()] * size)
    after = None if whole.data_ptr() == out.data_ptr() else (lambda: write(out, whole))
    to_be = WorkToBe([out], after, pg.begin("_allgather_base", [tensor]), awaited)
    moved = as_moved(whole, flat.numel(), pg.group)
    if moved is None:
        return _parts_gathered(pg, list(whole.view(size, -1)), flat, to_be)
    own = slice(pg.rank() * flat.numel(), (pg.rank() + 1) * flat.numel())
    if whole[own].data_ptr() != flat.data_ptr():
        write(whole[own], flat)
    return _gathered(pg, moved, adjoining([moved.numel() // size] * size), to_be)


def allgather(pg: Members, outs: Tensors, tensor: torch.Tensor, awaited: bool) -> Work:
    """Parts may be of different sizes."""
    if not movable(tensor) or not all(movable(out) for out in outs) or len(outs) != pg.size():
        return None
    if any(out.dtype is not tensor.dtype for out in outs):
        return None
    flats = [room_for(out) for out in outs]
    count_write(outs)
    span = pg.begin("all_gather", [tensor])
    to_be = WorkToBe([list(outs)], lambda: write_all(outs, flats), span, awaited)
    return _parts_gathered(pg, flats, flat_of(tensor), to_be)


def _parts_gathered(pg: Members, flats: Tensors, flat: torch.Tensor, to_be: WorkToBe) -> CommlabWork:
    own = bytes_of(flat)
    ranges = [Range(0, own.numel())] * pg.size()
    return _delivered(pg, "allgather", str(flat.dtype), [own], ranges, [bytes_of(part) for part in flats], to_be)


def allgather_coalesced(pg: Members, outs: Sequence[Tensors], tensors: Tensors, awaited: bool) -> Work:
    """``outs[r][k]`` gets tensor k of rank r: all of a rank's tensors are one stream of bytes."""
    everything = [*tensors, *(out for each in outs for out in each)]
    if not all(movable(tensor) for tensor in everything) or len(outs) != pg.size():
        return None
    span = pg.begin("all_gather", tensors)
    stream = [bytes_of(flat_of(tensor)) for tensor in tensors]
    room = [
        torch.empty(sum(out.numel() * out.element_size() for out in each), dtype=torch.uint8, device="cpu")
        for each in outs
    ]
    own = Range(0, sum(piece.numel() for piece in stream))

    def after() -> None:
        for each, found in zip(outs, room, strict=True):
            pieces = found.split([out.numel() * out.element_size() for out in each])
            for out, piece in zip(each, pieces, strict=True):
                write(out, piece.clone().view(out.dtype))

    detail = ", ".join(str(tensor.dtype) for tensor in tensors)
    to_be = WorkToBe(list(outs), after, span, awaited)
    return _delivered(pg, "allgather", detail, stream, [own] * pg.size(), room, to_be)


_TITLES: Final = {"alltoall": "all_to_all"}
"""What gloo's spans are called in torch's profile."""


def exchange(pg: Members, kind: str, detail: str, outs: Tensors, parts: Tensors, value: Any, awaited: bool) -> Work:
    """``parts[r]`` to rank r, and into ``outs[r]`` what r has for this rank: gather and scatter are alltoalls of which
    most parts are empty."""
    if not all(movable(tensor) for tensor in (*outs, *parts)):
        return None
    flats = [room_for(out) for out in outs]
    count_write(outs)
    span = pg.begin(_TITLES.get(kind, kind), [part for part in parts if part.numel()])
    stream = [bytes_of(flat_of(part)) for part in parts]
    ranges = adjoining([piece.numel() for piece in stream])
    room = [bytes_of(flat) for flat in flats]
    to_be = WorkToBe(value, lambda: write_all(outs, flats), span, awaited)
    return _delivered(pg, kind, detail, stream, ranges, room, to_be)


def alltoall_whole(pg: Members, out: torch.Tensor, tensor: torch.Tensor) -> Work:
    """all_to_all_single in equal parts, for a caller that waits, at once; None where it takes more."""
    group, size = pg.group, pg.size()
    if not in_window(group) or not (tensor.is_contiguous() and out.is_contiguous()):
        return None
    if tensor.is_conj() or tensor.is_neg() or out.is_conj() or out.is_neg() or torch.autograd._profiler_enabled():
        return None
    key = "all_to_all_single", out.shape, tensor.shape, out.dtype, tensor.dtype
    whole = group.plans.get(key)
    if whole is None:
        if any(not each.dim() or each.shape[0] % size for each in (out, tensor)):
            return None  # refused with words
        # The signature of exchange(), by which other ranks may go.
        whole = WholeDelivery.even(group, Signature("alltoall", detail=str(tensor.dtype)), out, tensor)
        remember(group, key, whole)
    if whole is None or not whole.at_once(group, out, tensor):
        return None
    count_write((out,))
    return pg.work((), [out])
