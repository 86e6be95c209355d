"""The collectives on tensors; allreduce itself is in :mod:`.allreduce`. All of them must be called by every rank of the
group, in the same order.

Tensors: CPU or CUDA; float32, float64, float16, bfloat16, int32, int64, and for allgather and broadcast every dtype
that torch has; contiguous or not; empty allowed. What is written in place is written as under ``torch.no_grad()``, and
autograd is told. Results are bitwise the same on all ranks, and from run to run for the same algorithm and group; not
across algorithms, which add in different orders.

Arguments that one rank can't accept are refused on every rank (RefusedError), before anything is sent: the rank takes
part in the agreement check all the same, and tells the others why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..chunks import Range, split, whole_at
from ..errors import UsageError
from ..native.versions import count_write
from ..runtime.group import Group
from ..runtime.world import resolve
from .halves import gather_at_once, gather_chunks_async, reduce_at_once, reduce_chunks_async
from .plan import require, where_of
from .refusing import Refusing
from .staging import Moved, moved, put_back, root_of
from .tensors import described, readable, writable


def _chunks_of(group: Group, kind: str, part: torch.Tensor, whole: torch.Tensor) -> tuple[Range, ...]:
    chunks = split(whole.numel(), group.size)
    if part.dtype != whole.dtype or part.numel() != chunks[group.rank].numel:
        raise UsageError(
            f"rank {group.rank}: {kind} cuts {whole.numel()} numbers of {whole.dtype} into "
            f"{[chunk.numel for chunk in chunks]} for "
            f"{group.size} ranks; this rank's part has {part.numel()} numbers of {part.dtype}"
        )
    return chunks


def reduce_scatter(
    out: torch.Tensor,
    tensor: torch.Tensor,
    op: str = "mean",
    name: str | None = None,
    algorithm: str = "auto",
    group: Group | None = None,
) -> torch.Tensor:
    """Write this rank's part of the reduced ``tensor`` into ``out`` and return it; ``tensor`` is left as it was.

    Part r of P is :func:`commlab.chunks.split`'s (the first ``numel mod P`` ranks hold one number more). Cost: half an
    allreduce, and a copy of ``tensor``.
    """
    group = resolve(group)
    kind = "reduce_scatter"
    with Refusing(group, kind, name):
        require(group, kind, tensor, op)
        target = writable(out, f"{where_of(group, kind, tensor)} into {described(out)}")
        chunks = _chunks_of(group, kind, target, tensor)
        given = readable(tensor, where_of(group, kind, tensor))
        short = reduce_at_once(given, target, chunks, op, name, algorithm, group)
    if short is not None and short():
        count_write((out,))
        return out
    with Refusing(group, kind, name):
        handle = reduce_chunks_async(_copied(given), chunks, op, name, algorithm, group=group, awaited=True)
    part = handle.wait()
    with torch.inference_mode(target.is_inference()):
        target.copy_(part.view(target.shape))
    return out


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """As a flat CPU buffer of its own."""
    return tensor.to("cpu").reshape(-1).clone()


def allgather(
    out: torch.Tensor,
    tensor: torch.Tensor,
    name: str | None = None,
    algorithm: str = "auto",
    group: Group | None = None,
) -> torch.Tensor:
    """Write every rank's ``tensor``, one after the other, into ``out`` on all ranks and return it. The parts are cut as
    in :func:`reduce_scatter`. Any dtype. Cost: half an allreduce."""
    group = resolve(group)
    with Refusing(group, "allgather", name):
        where = where_of(group, "allgather", tensor)
        given = readable(tensor, where)
        target = moved(out, f"{where} into {described(out)}", written=True)
        chunks = _chunks_of(group, "allgather", given, out)
        own = chunks[group.rank]
        mine = moved(given, where, written=False).flat
        target.flat[own.start : own.stop].copy_(mine.view(target.flat.dtype))
        cut = target.chunks(chunks)
        short = gather_at_once(target.units, cut, name, algorithm, group, target.meaning)
    if short is None or not short():
        _gather("allgather", target, cut, name, algorithm, group)
    put_back(target.flat, target.memory)
    count_write((out,))
    return out


def _gather(kind: str, target: Moved, chunks: Sequence[Range], name: str | None, algorithm: str, group: Group) -> None:
    """Bring rank r's chunk of ``target`` to all ranks, for all r."""
    with Refusing(group, kind, name):
        units, meaning = target.units, target.meaning
        handle = gather_chunks_async(units, chunks, name, algorithm, group=group, meaning=meaning, awaited=True)
    handle.wait()


def broadcast(
    tensor: torch.Tensor, root: int = 0, name: str | None = None, algorithm: str = "auto", group: Group | None = None
) -> torch.Tensor:
    """Overwrite ``tensor`` on all ranks with ``root``'s and return it. Any dtype. Cost with ``tree``: ceil(log2 P)
    steps; the root sends n ceil(log2 P); with ``ring`` (a pipelined chain): every rank but the last sends n once."""
    group = resolve(group)
    with Refusing(group, "broadcast", name):
        root = root_of(group, "broadcast", root)
        written = group.rank != root
        target = moved(tensor, where_of(group, "broadcast", tensor), written=written)
        chunks = target.chunks(whole_at(root, target.flat.numel(), group.size))
        short = gather_at_once(target.units, chunks, name, algorithm, group, target.meaning)
    if short is None or not short():
        _gather("broadcast", target, chunks, name, algorithm, group)
    if written:
        put_back(target.flat, target.memory)
        count_write((tensor,))
    return tensor


def reduce(
    tensor: torch.Tensor,
    root: int = 0,
    op: str = "mean",
    name: str | None = None,
    algorithm: str = "auto",
    group: Group | None = None,
) -> torch.Tensor:
    """Reduce ``tensor`` in place on ``root`` and return it; on the other ranks it is left as it was. Cost with
    ``tree``: ceil(log2 P) steps, every rank but the root sends n."""
    group = resolve(group)
    with Refusing(group, "reduce", name):
        root = root_of(group, "reduce", root)
        require(group, "reduce", tensor, op)
        where = where_of(group, "reduce", tensor)
        memory = writable(tensor, where) if group.rank == root else readable(tensor, where)
        given = readable(memory, where)
        chunks = whole_at(root, given.numel(), group.size)
        short = reduce_at_once(given, None, chunks, op, name, algorithm, group)
    if short is not None and short():
        if group.rank == root:
            if given is not memory:
                put_back(given, memory)
            count_write((tensor,))
        return tensor
    with Refusing(group, "reduce", name):
        handle = reduce_chunks_async(_copied(given), chunks, op, name, algorithm, group=group, awaited=True)
    part = handle.wait()
    if group.rank == root:
        with torch.inference_mode(memory.is_inference()):
            memory.copy_(part.view(memory.shape))
    return tensor


def barrier(group: Group | None = None) -> None:
    """Return once every rank has called it."""
    resolve(group).barrier()


def empty(shape: Sequence[int] | int, dtype: torch.dtype = torch.float32, group: Group | None = None) -> torch.Tensor:
    """A tensor that lives in the window, zeroed: collectives on it copy nothing. Not collective. The memory is given
    back once nobody on this rank has the tensor, or a view of it, any more; peers let go of it with their next tensor
    of this kind. On several nodes the window is that of this rank's node. Where there is none, an ordinary tensor.
    SharedMemoryError where there is not enough memory, before any of it is touched."""
    group = resolve(group)
    window = group.window if group.node is None else group.node.window
    if window is None:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    shape = torch.Size((shape,) if isinstance(shape, int) else shape)
    memory, _ = window.allocate(shape.numel() * dtype.itemsize, kept=False)
    # .data: a write to one tensor is no write to the others of its segment.
    return memory.view(dtype).view(shape).data
