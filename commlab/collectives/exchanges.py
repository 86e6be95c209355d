"""Exchanges: alltoall, gather, scatter and the allgather of parts of any size, for tensors of every dtype.

All of them are deliveries (:mod:`.delivery`): on one node each rank writes what it has once and reads what is meant for
it once, with one wait up to 64 KB; between nodes one message per pair of ranks that have something for each other. All
must be called by every rank of the group, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..chunks import Range
from ..errors import UsageError
from ..runtime.agreement import Signature
from ..runtime.group import Group
from ..runtime.world import resolve
from .delivery import bytes_of, deliver_async


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers in order on the CPU: the tensor's own memory where that is possible."""
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.to("cpu").contiguous()


def _room(out: torch.Tensor) -> torch.Tensor:
    own = out.detach()
    return own if own.is_cpu and own.is_contiguous() else torch.empty(own.shape, dtype=own.dtype, device="cpu")


def _adjoining(pieces: Sequence[torch.Tensor]) -> list[Range]:
    found, start = [], 0
    for piece in pieces:
        found.append(Range(start, start + piece.numel()))
        start += piece.numel()
    return found


def _one_each(group: Group, kind: str, tensors: Sequence[torch.Tensor]) -> None:
    if len(tensors) != group.size:
        raise UsageError(
            f"rank {group.rank}: {kind} of {len(tensors)} tensors among {group.size} ranks: give one for each rank"
        )


def _exchange(
    group: Group, signature: Signature, outs: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
) -> None:
    """``tensors[r]`` to rank r; into ``outs[r]`` what r has for this rank."""
    stream = [bytes_of(_flat(tensor)) for tensor in tensors]
    rooms = [_room(out) for out in outs]
    deliver_async(group, signature, stream, _adjoining(stream), [bytes_of(room) for room in rooms]).wait()
    for out, room in zip(outs, rooms, strict=True):
        if room.data_ptr() != out.data_ptr() or not out.is_cpu:
            out.detach().copy_(room)


def alltoall(
    out: torch.Tensor,
    tensor: torch.Tensor,
    out_splits: Sequence[int] | None = None,
    splits: Sequence[int] | None = None,
    name: str | None = None,
    group: Group | None = None,
) -> torch.Tensor:
    """Send ``splits[r]`` rows of ``tensor`` (along its first dimension, in rank order) to every rank r; write what they
    send to this rank, in rank order, into ``out`` and return it.

    ``out_splits[r]``: how many rows come from rank r. Without splits all parts are equal. Any dtype. Cost: each rank
    sends n (P-1)/P and receives as much. DisagreementError on all ranks where one sends more or less than the other
    expects.
    """
    group = resolve(group)
    parts = _rows(group, tensor, splits)
    outs = _rows(group, out, out_splits)
    _exchange(group, Signature("alltoall", (), tensor.dtype, name), outs, parts)
    return out


def _rows(group: Group, whole: torch.Tensor, splits: Sequence[int] | None) -> list[torch.Tensor]:
    rows = whole.shape[0] if whole.dim() else 0
    if splits is None:
        splits = [rows // group.size] * group.size
    if not whole.dim() or len(splits) != group.size or sum(splits) != rows or min(splits) < 0:
        raise UsageError(
            f"rank {group.rank}: alltoall of {list(whole.shape)} among {group.size} ranks in {list(splits)}: the "
            f"splits are rows of the first dimension, one for each rank, and {rows} in all"
        )
    return list(whole.detach().split(list(splits)))


def gather(
    outs: Sequence[torch.Tensor] | None,
    tensor: torch.Tensor,
    root: int = 0,
    name: str | None = None,
    group: Group | None = None,
) -> Sequence[torch.Tensor] | None:
    """On ``root`` write rank r's ``tensor`` into ``outs[r]`` for all r, and return ``outs``; elsewhere ``outs`` means
    nothing. Tensors of different ranks may differ in shape. Any dtype. Cost: every rank but the root sends n."""
    group = resolve(group)
    _rooted(group, "gather", root)
    nothing = tensor.new_empty(0)
    lists = list(outs or ()) if group.rank == root else [nothing] * group.size
    _one_each(group, "gather", lists)
    parts = [tensor if rank == root else nothing for rank in range(group.size)]
    _exchange(group, Signature("gather", (), tensor.dtype, name, f"root {root}"), lists, parts)
    return outs if group.rank == root else None


def scatter(
    out: torch.Tensor,
    tensors: Sequence[torch.Tensor] | None,
    root: int = 0,
    name: str | None = None,
    group: Group | None = None,
) -> torch.Tensor:
    """Write ``root``'s ``tensors[r]`` into ``out`` on rank r, and return ``out``; elsewhere ``tensors`` means nothing.
    They may differ in shape. Any dtype. Cost: the root sends each of them once."""
    group = resolve(group)
    _rooted(group, "scatter", root)
    nothing = out.new_empty(0)
    parts = list(tensors or ()) if group.rank == root else [nothing] * group.size
    _one_each(group, "scatter", parts)
    outs = [out if rank == root else nothing for rank in range(group.size)]
    _exchange(group, Signature("scatter", (), out.dtype, name, f"root {root}"), outs, parts)
    return out


def allgather_parts(tensor: torch.Tensor, name: str | None = None, group: Group | None = None) -> list[torch.Tensor]:
    """Every rank's ``tensor`` on every rank, in rank order, as new tensors on the CPU. Ranks' tensors may differ in
    their first dimension, which the others need not know. Any dtype with the same other dimensions on all ranks. Cost:
    every rank sends n to each of the others."""
    group = resolve(group)
    flat = _flat(tensor)
    rows = flat if flat.dim() else flat.view(1)
    shape = rows.shape[1:]
    row_bytes = shape.numel() * rows.element_size()
    found: list[torch.Tensor] = []

    def room(sizes: Sequence[int]) -> list[torch.Tensor]:
        for size_bytes in sizes:
            count = size_bytes // row_bytes if row_bytes else 0
            found.append(torch.empty((count, *shape), dtype=rows.dtype, device="cpu"))
        return [bytes_of(each) for each in found]

    signature = Signature("allgather parts", tuple(shape), rows.dtype, name)
    own = bytes_of(rows)
    deliver_async(group, signature, [own], [Range(0, own.numel())] * group.size, room).wait()
    return found


def _rooted(group: Group, kind: str, root: int) -> None:
    if not 0 <= root < group.size:
        raise UsageError(f"rank {group.rank}: {kind} with root {root}; the group has ranks 0..{group.size - 1}")
