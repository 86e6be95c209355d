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
from .halves import gather_chunks_async, reduce_chunks_async
from .plan import require, where_of
from .staging import moved, put_back, root_of
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
    try:
        require(group, kind, tensor, op)
        target = writable(out, f"{where_of(group, kind, tensor)} into {described(out)}")
        chunks = _chunks_of(group, kind, target, tensor)
        flat = readable(tensor, where_of(group, kind, tensor)).to("cpu").reshape(-1).clone()
        handle = reduce_chunks_async(flat, chunks, op, name, algorithm, group=group, awaited=True)
    except Exception as error:
        handle = group.refuse(kind, name, error)
    part = handle.wait()
    with torch.inference_mode(target.is_inference()):
        target.copy_(part.view(target.shape))
    return out


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
    try:
        where = where_of(group, "allgather", tensor)
        given = readable(tensor, where)
        target = moved(out, f"{where} into {described(out)}", written=True)
        chunks = _chunks_of(group, "allgather", given, out)
        own = chunks[group.rank]
        mine = moved(given, where, written=False).flat
        target.flat[own.start : own.stop].copy_(mine.view(target.flat.dtype))
        handle = gather_chunks_async(
            target.units, target.chunks(chunks), name, algorithm, group=group, meaning=target.meaning, awaited=True
        )
    except Exception as error:
        handle = group.refuse("allgather", name, error)
    handle.wait()
    put_back(target.flat, target.memory)
    count_write((out,))
    return out


def broadcast(
    tensor: torch.Tensor, root: int = 0, name: str | None = None, algorithm: str = "auto", group: Group | None = None
) -> torch.Tensor:
    """Overwrite ``tensor`` on all ranks with ``root``'s and return it. Any dtype. Cost with ``tree``: ceil(log2 P)
    steps; the root sends n ceil(log2 P); with ``ring`` (a pipelined chain): every rank but the last sends n once."""
    group = resolve(group)
    try:
        root = root_of(group, "broadcast", root)
        written = group.rank != root
        target = moved(tensor, where_of(group, "broadcast", tensor), written=written)
        chunks = target.chunks(whole_at(root, target.flat.numel(), group.size))
        handle = gather_chunks_async(
            target.units, chunks, name, algorithm, group=group, meaning=target.meaning, awaited=True
        )
    except Exception as error:
        handle = group.refuse("broadcast", name, error)
    handle.wait()
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
    try:
        root = root_of(group, "reduce", root)
        require(group, "reduce", tensor, op)
        where = where_of(group, "reduce", tensor)
        memory = writable(tensor, where) if group.rank == root else readable(tensor, where)
        flat = readable(memory, where).to("cpu").reshape(-1).clone()
        chunks = whole_at(root, flat.numel(), group.size)
        handle = reduce_chunks_async(flat, chunks, op, name, algorithm, group=group, awaited=True)
    except Exception as error:
        handle = group.refuse("reduce", name, error)
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
