"""Exchanges: alltoall, gather, scatter and the allgather of parts of any size, for tensors of every dtype.

All of them are deliveries (:mod:`.delivery`): on one node each rank writes what it has once and reads what is meant for
it once, with one wait up to 64 KB; between nodes one message per pair of ranks that have something for each other. All
must be called by every rank of the group, in the same order. Which tensors they take, and how one rank's refusal
reaches the others: see :mod:`.operations`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch

from ..chunks import Range
from ..errors import UsageError
from ..native.versions import count_write
from ..runtime import raw
from ..runtime.agreement import Signature
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..runtime.world import resolve
from .delivery import bytes_of, deliver_async
from .plan import where_of
from .staging import Moved, as_flat, moved, put_back, require_name, root_of
from .tensors import described, readable


def _adjoining(pieces: Sequence[torch.Tensor]) -> list[Range]:
    found, start = [], 0
    for piece in pieces:
        found.append(Range(start, start + piece.numel()))
        start += piece.numel()
    return found


def _one_each(where: str, group: Group, tensors: Sequence[torch.Tensor]) -> None:
    if len(tensors) != group.size:
        raise UsageError(f"{where}: {len(tensors)} tensors among {group.size} ranks: give one for each rank")


def _alike(where: str, what: Moved, others: Iterable[tuple[torch.Tensor, Moved]]) -> None:
    for tensor, other in others:
        if other.memory.dtype is not what.memory.dtype or other.meaning != what.meaning:
            raise UsageError(f"{where} and {described(tensor)}: both must be of one dtype, and of one scale")


def _meeting(pieces: Sequence[torch.Tensor]) -> bool:
    """Whether two of these flat buffers have memory in common."""
    spans = sorted((piece.data_ptr(), piece.numel() * piece.element_size()) for piece in pieces if piece.numel())
    return any(start + nbytes > after for (start, nbytes), (after, _) in pairwise(spans))


def _start(
    where: str, group: Group, signature: Signature, outs: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]
) -> Handle:
    """``parts[r]`` to rank r; into ``outs[r]`` what r has for this rank."""
    stream = [bytes_of(as_flat(part, part.dtype)) for part in parts]
    rooms = [as_flat(out, out.dtype) for out in outs]
    if _meeting(rooms):
        raise UsageError(f"{where}: two of the tensors to write into share memory; give each its own")
    if _meeting([*rooms, *_apart(stream)]):
        stream = [piece.clone() for piece in stream]

    def finish() -> None:
        for room, out in zip(rooms, outs, strict=True):
            put_back(room, out)

    return deliver_async(group, signature, stream, _adjoining(stream), [bytes_of(room) for room in rooms], None, finish)


def _apart(stream: Sequence[torch.Tensor]) -> Iterable[torch.Tensor]:
    """Each piece once: the same one may go to several ranks."""
    return {(piece.data_ptr(), piece.numel()): piece for piece in stream}.values()


_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


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
    try:
        where = where_of(group, "alltoall", tensor)
        require_name(where, name)
        into = f"{where} into {described(out)}"
        given, target = moved(tensor, where, written=False), moved(out, into, written=True)
        _alike(where, given, [(out, target)])
        parts, outs = _rows(where, group, given.memory, splits), _rows(into, group, target.memory, out_splits)
        signature = Signature("alltoall", (), tensor.dtype, name, given.meaning)
        handle = _start(into, group, signature, outs, parts)
    except Exception as error:
        handle = group.refuse("alltoall", name, error)
    handle.wait()
    count_write((out,))
    return out


def _rows(where: str, group: Group, whole: torch.Tensor, splits: Sequence[int] | None) -> list[torch.Tensor]:
    rows = whole.shape[0] if whole.dim() else 0
    if splits is None:
        splits = [rows // group.size] * group.size
    if not whole.dim() or len(splits) != group.size or sum(splits) != rows or min(splits) < 0:
        raise UsageError(
            f"{where}: {list(whole.shape)} among {group.size} ranks in {list(splits)}: the splits are rows of the "
            f"first dimension, one for each rank, and {rows} in all"
        )
    return list(whole.split(list(splits)))


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
    try:
        root = root_of(group, "gather", root)
        where = where_of(group, "gather", tensor)
        require_name(where, name)
        given = moved(tensor, where, written=False)
        rooms = [_NOTHING] * group.size
        if group.rank == root:
            _one_each(where, group, outs or ())
            targets = [moved(out, f"{where} into {described(out)}", written=True) for out in outs or ()]
            _alike(where, given, zip(outs or (), targets, strict=True))
            rooms = [target.memory for target in targets]
        parts = [given.memory if rank == root else _NOTHING for rank in range(group.size)]
        detail = ", ".join(filter(None, (f"root {root}", given.meaning)))
        handle = _start(where, group, Signature("gather", (), tensor.dtype, name, detail), rooms, parts)
    except Exception as error:
        handle = group.refuse("gather", name, error)
    handle.wait()
    if group.rank != root:
        return None
    count_write(outs or ())
    return outs


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
    try:
        root = root_of(group, "scatter", root)
        where = where_of(group, "scatter", out)
        require_name(where, name)
        target = moved(out, where, written=True)
        parts = [_NOTHING] * group.size
        if group.rank == root:
            _one_each(where, group, tensors or ())
            given = [moved(each, f"{where} of {described(each)}", written=False) for each in tensors or ()]
            _alike(where, target, zip(tensors or (), given, strict=True))
            parts = [each.memory for each in given]
        rooms = [target.memory if rank == root else _NOTHING for rank in range(group.size)]
        detail = ", ".join(filter(None, (f"root {root}", target.meaning)))
        handle = _start(where, group, Signature("scatter", (), out.dtype, name, detail), rooms, parts)
    except Exception as error:
        handle = group.refuse("scatter", name, error)
    handle.wait()
    count_write((out,))
    return out


def allgather_parts(tensor: torch.Tensor, name: str | None = None, group: Group | None = None) -> list[torch.Tensor]:
    """Every rank's ``tensor`` on every rank, in rank order, as new tensors on the CPU. Ranks' tensors may differ in
    their first dimension, which the others need not know; a tensor without dimensions is one row. Any dtype with the
    same other dimensions on all ranks. Cost: every rank sends n to each of the others."""
    group = resolve(group)
    received: list[torch.Tensor] = []

    def room(sizes: Sequence[int]) -> list[torch.Tensor]:
        received.extend(torch.empty(size_bytes, dtype=torch.uint8, device="cpu") for size_bytes in sizes)
        return received

    try:
        where = where_of(group, "allgather_parts", tensor)
        require_name(where, name)
        given = readable(tensor, where)
        rows = given if given.dim() else given.reshape(1)
        meaning, detail = raw.meaning_of(rows), moved(rows, where, written=False).meaning
        own, row_bytes = raw.bytes_of(rows).to("cpu"), rows.shape[1:].numel() * rows.element_size()
        if not row_bytes:  # rows without numbers: how many there are is all there is to tell
            own = torch.tensor([rows.shape[0]], dtype=torch.int64, device="cpu").view(torch.uint8)
        signature = Signature("allgather parts", tuple(rows.shape[1:]), rows.dtype, name, detail)
        handle = deliver_async(group, signature, [own], [Range(0, own.numel())] * group.size, room)
    except Exception as error:
        handle = group.refuse("allgather_parts", name, error)
    handle.wait()
    found = []
    for data in received:
        count = data.numel() // row_bytes if row_bytes else int(data.view(torch.int64))
        shape = [count, *rows.shape[1:]]
        if rows.is_quantized:
            found.append(raw.from_bytes(data, {**meaning, "shape": shape}))
        else:
            numbers = data if row_bytes else data[:0]
            found.append(numbers.view(rows.dtype).view(shape))
    return found
