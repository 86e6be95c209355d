"""The operations that follow gradients: what is done with numbers on the way forward is undone on the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import world
from ..process_sets import ProcessSet, global_process_set
from . import mpi_ops
from .compression import Compression
from .start import Average, ReduceOp, Tensors, op_of, synchronize


def _size(process_set: ProcessSet) -> int:
    return world.size() if process_set is global_process_set else len(process_set.ranks or ())


def _index(process_set: ProcessSet) -> int:
    return world.rank() if process_set is global_process_set else process_set.rank()


def _detached(tensor: Any) -> Any:
    """The numbers alone. What is no tensor is refused where the operation is started, for all ranks to know."""
    return tensor.detach() if isinstance(tensor, torch.Tensor) else tensor


class _Allreduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: Any, op: ReduceOp, before: float, after: float, group: Any, *tensors: Any) -> Any:
        ctx.arguments = op, before, after, group
        start = mpi_ops.grouped_allreduce_async
        found = synchronize(
            start([_detached(t) for t in tensors], None, name, op, before, after, group)
            if len(tensors) != 1
            else mpi_ops.allreduce_async(_detached(tensors[0]), None, name, op, before, after, group)
        )
        return tuple(found) if len(tensors) > 1 else found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        op, before, after, group = ctx.arguments
        found = _Allreduce.apply(None, op, before, after, group, *gradients)
        return (None,) * 5 + (found if isinstance(found, tuple) else (found,))


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Reduce ``tensor``, which is left as it was, over all ranks of the set, and return the result (default: the
    average). Gradients are reduced in the same way."""
    sent, ctx = compression.compress(tensor)
    chosen = op_of(op, average)
    found = _Allreduce.apply(name, chosen, prescale_factor, postscale_factor, process_set, sent)
    whole: torch.Tensor = compression.decompress(found, ctx)
    return whole


def grouped_allreduce(
    tensors: Tensors,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> tuple[torch.Tensor, ...]:
    """Reduce all ``tensors`` as one operation; see :func:`allreduce`."""
    pairs = [compression.compress(tensor) for tensor in tensors]
    chosen, sent = op_of(op, average), [pair[0] for pair in pairs]
    found = _Allreduce.apply(name, chosen, prescale_factor, postscale_factor, process_set, *sent)
    found = found if isinstance(found, tuple) else (found,)
    return tuple(compression.decompress(each, pair[1]) for each, pair in zip(found, pairs, strict=True))


class _Allgather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: Any, group: Any, *tensors: Any) -> Any:
        found = synchronize(mpi_ops.grouped_allgather_async([_detached(t) for t in tensors], name, group))
        ctx.group, ctx.shapes = group, [tensor.shape for tensor in tensors]
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        group = ctx.group
        rows = [shape[0] if shape else 1 for shape in ctx.shapes]
        counts = synchronize(mpi_ops.allgather_async(torch.tensor([rows], device="cpu"), None, group))
        found = mpi_ops.grouped_allreduce_async(
            [g.contiguous() for g in gradients], None, None, Average, 1.0, 1.0, group
        )
        before = counts[: _index(group)].sum(0).tolist()
        return (
            None,
            None,
            *(
                whole.narrow(0, at, count).reshape(shape)
                for whole, at, count, shape in zip(synchronize(found), before, rows, ctx.shapes, strict=True)
            ),
        )


def allgather(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """Every rank's tensor, one behind the other along the first dimension, which may differ between ranks. A rank's
    gradient is the ranks' average for its rows."""
    found: torch.Tensor = _Allgather.apply(name, process_set, tensor)[0]
    return found


def grouped_allgather(
    tensors: Tensors, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[torch.Tensor]:
    """An allgather of several tensors as one operation; see :func:`allgather`."""
    return list(_Allgather.apply(name, process_set, *tensors))


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any, root_rank: int, name: Any, group: Any) -> Any:
        ctx.root_rank, ctx.group = root_rank, group
        return synchronize(mpi_ops.broadcast_async(_detached(tensor), root_rank, name, group))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        reduced = synchronize(mpi_ops.allreduce_async(gradient, None, None, Average, 1.0, 1.0, ctx.group))
        if world.rank() != ctx.root_rank:
            reduced.zero_()
        return reduced, None, None, None


def broadcast(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """The tensor of ``root_rank`` (a rank of the job) on all ranks of the set, as a new tensor. The root's gradient is
    the ranks' average, the others' is zero."""
    found: torch.Tensor = _Broadcast.apply(tensor, root_rank, name, process_set)
    return found


class _Alltoall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any, splits: Any, name: Any, group: Any) -> Any:
        asked = splits
        if splits is None and isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[0] % _size(group) == 0:
            asked = [tensor.shape[0] // _size(group)] * _size(group)
        found, received = synchronize(mpi_ops.alltoall_async(_detached(tensor), asked, name, group))
        ctx.received, ctx.group, ctx.rows = received, group, tensor.shape[0]
        received = received.to(splits.device) if isinstance(splits, torch.Tensor) else received
        ctx.mark_non_differentiable(received)
        return found, received

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        back, _ = synchronize(mpi_ops.alltoall_async(gradients[0].contiguous(), ctx.received, None, ctx.group))
        if back.shape[0] < ctx.rows:  # rows that no rank was given
            back = torch.cat([back, back.new_zeros((ctx.rows - back.shape[0], *back.shape[1:]))])
        return back, None, None, None


def alltoall(
    tensor: torch.Tensor,
    splits: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send ``splits[r]`` rows of ``tensor`` to every rank r of the set (None: equally many to each). Returns what has
    arrived, in rank order, and, where splits are given, how many rows came from each rank (int32)."""
    found, received = _Alltoall.apply(tensor, splits, name, process_set)
    return found if splits is None else (found, received)


class _Reducescatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: Any, op: Any, group: Any, before: float, after: float, *tensors: Any) -> Any:
        sent = [_detached(tensor) for tensor in tensors]
        found = synchronize(mpi_ops.grouped_reducescatter_async(sent, name, op, group, before, after))
        ctx.arguments, ctx.rows = (op, group, before, after), [tensor.shape[:1] for tensor in tensors]
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        op, group, before, after = ctx.arguments
        # A sum's gradient is scaled as allreduce's would be, which adds the ranks' gradients up.
        factor = before * after * (1.0 if op == Average else _size(group))
        sent = [gradient.contiguous() for gradient in gradients]
        found = synchronize(mpi_ops.grouped_allgather_async(sent, None, group))
        return (*(None,) * 5, *(each if factor == 1.0 else each * factor for each in found))


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """Reduce ``tensor`` over all ranks of the set, and return this rank's rows. The first ranks get one row more where
    they can't be dealt out equally."""
    return grouped_reducescatter([tensor], name, compression, op, process_set, prescale_factor, postscale_factor)[0]


def grouped_reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """A reducescatter of several tensors as one operation; see :func:`reducescatter`."""
    pairs = [compression.compress(tensor) for tensor in tensors]
    sent = [pair[0] for pair in pairs]
    found = _Reducescatter.apply(name, op, process_set, prescale_factor, postscale_factor, *sent)
    return [compression.decompress(each, pair[1]) for each, pair in zip(found, pairs, strict=True)]
