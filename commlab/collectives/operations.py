"""The collectives on tensors; allreduce itself is in :mod:`.allreduce`. All of them must be called by every rank of the
group, in the same order.

Tensors: CPU or CUDA; float32, float64, float16, bfloat16, int32, int64; contiguous or not; empty allowed. Results are
bitwise the same on all ranks, and from run to run for the same algorithm and group; not across algorithms, which add in
different orders.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..chunks import Range, split, whole_at
from ..errors import UsageError
from ..runtime.group import Group
from ..runtime.world import resolve
from .halves import gather_chunks_async, reduce_chunks_async
from .plan import require
from .staging import as_flat, put_back


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
    require(group, "reduce_scatter", tensor, op)
    chunks = _chunks_of(group, "reduce_scatter", out, tensor)
    flat = tensor.detach().to("cpu").reshape(-1).clone()
    part = reduce_chunks_async(flat, chunks, op, name, algorithm, group=group).wait()
    out.detach().copy_(part.view(out.shape))
    return out


def allgather(
    out: torch.Tensor,
    tensor: torch.Tensor,
    name: str | None = None,
    algorithm: str = "auto",
    group: Group | None = None,
) -> torch.Tensor:
    """Write every rank's ``tensor``, one after the other, into ``out`` on all ranks and return it. The parts are cut as
    in :func:`reduce_scatter`. Cost: half an allreduce."""
    group = resolve(group)
    require(group, "allgather", tensor)
    chunks = _chunks_of(group, "allgather", tensor, out)
    flat = as_flat(out, out.dtype)
    own = chunks[group.rank]
    flat[own.start : own.stop].copy_(tensor.detach().reshape(-1))
    gather_chunks_async(flat, chunks, name, algorithm, group=group).wait()
    put_back(flat, out)
    return out


def _rooted(group: Group, kind: str, root: int) -> None:
    if not 0 <= root < group.size:
        raise UsageError(f"rank {group.rank}: {kind} with root {root}; the group has ranks 0..{group.size - 1}")


def broadcast(
    tensor: torch.Tensor, root: int = 0, name: str | None = None, algorithm: str = "auto", group: Group | None = None
) -> torch.Tensor:
    """Overwrite ``tensor`` on all ranks with ``root``'s and return it. Cost with ``tree``: ceil(log2 P) steps; the root
    sends n ceil(log2 P); with ``ring`` (a pipelined chain): every rank but the last sends n once."""
    group = resolve(group)
    _rooted(group, "broadcast", root)
    require(group, "broadcast", tensor)
    flat = as_flat(tensor, tensor.dtype)
    chunks = whole_at(root, flat.numel(), group.size)
    gather_chunks_async(flat, chunks, name, algorithm, group=group).wait()
    put_back(flat, tensor)
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
    _rooted(group, "reduce", root)
    require(group, "reduce", tensor, op)
    flat = tensor.detach().to("cpu").reshape(-1).clone()
    chunks = whole_at(root, flat.numel(), group.size)
    part = reduce_chunks_async(flat, chunks, op, name, algorithm, group=group).wait()
    if group.rank == root:
        tensor.detach().copy_(part.view(tensor.shape))
    return tensor


def barrier(group: Group | None = None) -> None:
    """Return once every rank has called it."""
    resolve(group).barrier()


def empty(shape: Sequence[int] | int, dtype: torch.dtype = torch.float32, group: Group | None = None) -> torch.Tensor:
    """A tensor that lives in the window, zeroed: collectives on it copy nothing. Not collective. The memory is given
    back once nobody on this rank has the tensor, or a view of it, any more; peers let go of it with their next tensor
    of this kind. Where the group shares no window, an ordinary tensor. SharedMemoryError where there is not enough
    memory, before any of it is touched."""
    group = resolve(group)
    if group.window is None:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    shape = torch.Size((shape,) if isinstance(shape, int) else shape)
    memory, _ = group.window.allocate(shape.numel() * dtype.itemsize, kept=False)
    return memory.view(dtype).view(shape)
