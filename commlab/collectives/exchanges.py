"""Exchanges: alltoall, gather, scatter and the allgather of parts of any size, for tensors of every dtype.

All of them are deliveries (:mod:`.delivery`): on one node each rank writes what it has once and reads what is meant for
it once, with one wait up to 64 KB; between nodes one message per pair of ranks that have something for each other. All
must be called by every rank of the group, in the same order. Which tensors they take, and how one rank's refusal
reaches the others: see :mod:`.operations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import TypeAlias

import torch

from ..chunks import Range, adjoining
from ..errors import UsageError
from ..native.dtypes import DTYPES
from ..native.versions import count_write
from ..runtime import raw
from ..runtime.agreement import Signature
from ..runtime.group import Group
from ..runtime.world import resolve
from .delivery import WholeDelivery, bytes_of, deliver, deliver_async, in_window
from .plan import remember, where_of
from .refusing import Refusing
from .staging import as_flat, carried, put_back, require_name, root_of
from .tensors import PLAIN, described, readable, surely_writable

_Carried: TypeAlias = tuple[torch.Tensor, str]
"""What :func:`commlab.collectives.staging.carried` gives."""


def _alike(where: str, what: _Carried, tensor: torch.Tensor, other: _Carried) -> None:
    if other[0].dtype is not what[0].dtype or other[1] != what[1]:
        raise UsageError(f"{where} and {described(tensor)}: both must be of one dtype, and of one scale")


def _of_root(
    where: str, group: Group, mine: _Carried, tensors: Sequence[torch.Tensor] | None, word: str, *, written: bool
) -> list[torch.Tensor]:
    """The memory of the root's ``tensors``, one for each rank."""
    tensors = tensors or ()
    if len(tensors) != group.size:
        raise UsageError(f"{where}: {len(tensors)} tensors among {group.size} ranks: give one for each rank")
    found = []
    for tensor in tensors:
        found.append(carried(tensor, f"{where} {word} {described(tensor)}", written=written))
        _alike(where, mine, tensor, found[-1])
    return [memory for memory, _ in found]


def _meeting(pieces: Sequence[torch.Tensor]) -> bool:
    """Whether two of these flat buffers have memory in common."""
    spans = sorted((piece.data_ptr(), piece.numel() * piece.element_size()) for piece in pieces if piece.numel())
    return any(start + nbytes > after for (start, nbytes), (after, _) in pairwise(spans))


def _ready(
    where: str, group: Group, signature: Signature, outs: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]
) -> Callable[[], None]:
    """What brings ``parts[r]`` to rank r, and into ``outs[r]`` what r has for this rank."""
    stream = [bytes_of(as_flat(part, part.dtype)) for part in parts]
    rooms = [as_flat(out, out.dtype) for out in outs]
    if _meeting(rooms):
        raise UsageError(f"{where}: two of the tensors to write into share memory; give each its own")
    if _meeting([*rooms, *_apart(stream)]):
        stream = [piece.clone() for piece in stream]

    def finish() -> None:
        for room, out in zip(rooms, outs, strict=True):
            put_back(room, out)

    ranges = adjoining(piece.numel() for piece in stream)
    return partial(deliver, group, signature, stream, ranges, [bytes_of(room) for room in rooms], finish)


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
    key = _key(group, out, tensor, name) if splits is None and out_splits is None else None
    whole = None if key is None else group.plans.get(key)
    if whole is not None and whole.at_once(group, out, tensor):
        count_write((out,))
        return out
    with Refusing(group, "alltoall", name):
        where = where_of(group, "alltoall", tensor)
        require_name(where, name)
        into = f"{where} into {described(out)}"
        given, target = carried(tensor, where, written=False), carried(out, into, written=True)
        _alike(where, given, out, target)
        parts, outs = _rows(where, group, given[0], splits), _rows(into, group, target[0], out_splits)
        signature = Signature("alltoall", (), tensor.dtype, name, given[1])
        go = _ready(into, group, signature, outs, parts)
        if key is not None and whole is None:
            remember(group, key, WholeDelivery.even(group, signature, out, tensor))
    go()
    count_write((out,))
    return out


def _key(group: Group, out: torch.Tensor, tensor: torch.Tensor, name: str | None) -> tuple[object, ...] | None:
    """Of alltoalls in equal parts that differ in their memory alone, which is plain memory; None for others."""
    try:
        plain = surely_writable(out) and type(tensor) in PLAIN and tensor.layout is torch.strided
        if not (plain and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_nested and in_window(group)):
            return None
        if out.dtype is not tensor.dtype or tensor.dtype not in DTYPES:
            return None
        first, start = out.data_ptr(), tensor.data_ptr()
        if out.is_neg() or tensor.is_neg() or (first < start + tensor.nbytes and start < first + out.nbytes):
            return None
        key = "alltoall", out.shape, tensor.shape, tensor.dtype, name
        hash(key)
    except (AttributeError, RuntimeError, TypeError):
        return None  # refused with words
    return key


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


def _rooted(kind: str, tensor: torch.Tensor, name: str | None, root: int, mine: _Carried) -> Signature:
    return Signature(kind, (), tensor.dtype, name, ", ".join(filter(None, (f"root {root}", mine[1]))))


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
    with Refusing(group, "gather", name):
        root = root_of(group, "gather", root)
        where = where_of(group, "gather", tensor)
        require_name(where, name)
        mine = carried(tensor, where, written=False)
        rooms, parts = [_NOTHING] * group.size, [_NOTHING] * group.size
        parts[root] = mine[0]
        if group.rank == root:
            rooms = _of_root(where, group, mine, outs, "into", written=True)
        go = _ready(where, group, _rooted("gather", tensor, name, root, mine), rooms, parts)
    go()
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
    with Refusing(group, "scatter", name):
        root = root_of(group, "scatter", root)
        where = where_of(group, "scatter", out)
        require_name(where, name)
        mine = carried(out, where, written=True)
        rooms, parts = [_NOTHING] * group.size, [_NOTHING] * group.size
        rooms[root] = mine[0]
        if group.rank == root:
            parts = _of_root(where, group, mine, tensors, "of", written=False)
        go = _ready(where, group, _rooted("scatter", out, name, root, mine), rooms, parts)
    go()
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

    with Refusing(group, "allgather_parts", name):
        where = where_of(group, "allgather_parts", tensor)
        require_name(where, name)
        given = readable(tensor, where)
        rows = given if given.dim() else given.reshape(1)
        meaning, detail = raw.meaning_of(rows), carried(rows, where, written=False)[1]
        own, row_bytes = raw.bytes_of(rows).to("cpu"), rows.shape[1:].numel() * rows.element_size()
        if not row_bytes:  # rows without numbers: how many there are is all there is to tell
            own = torch.tensor([rows.shape[0]], dtype=torch.int64, device="cpu").view(torch.uint8)
        signature = Signature("allgather parts", tuple(rows.shape[1:]), rows.dtype, name, detail)
    deliver_async(group, signature, [own], [Range(0, own.numel())] * group.size, room, awaited=True).wait()
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
