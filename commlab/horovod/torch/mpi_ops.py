"""Operations on tensors that are started by name, and carried out by the engine's thread. None of these follows
gradients; the forms that do are in :mod:`.autograd`.

``process_set``: the ranks that take part. ``name``: by which ranks match operations, unique among those under way;
operations without a name are matched in the order of their calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import world
from ..process_sets import ProcessSet, global_process_set
from .start import (
    AsyncHandle,
    Average,
    Tensors,
    one,
    op_of,
    start,
    start_alltoall,
    start_broadcast,
    start_gather,
    start_reduce,
    start_reducescatter,
    start_sparse,
    synchronize,
)


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> AsyncHandle:
    """Start to reduce ``tensor``, which is left as it was, over all ranks of the set; the result is a new tensor."""
    scales = prescale_factor, postscale_factor
    return start_reduce([tensor], None, name, op_of(op, average), scales, process_set, one)


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> AsyncHandle:
    """Start to reduce ``tensor`` in place over all ranks of the set."""
    scales = prescale_factor, postscale_factor
    return start_reduce([tensor], [tensor], name, op_of(op, average), scales, process_set, one)


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Reduce ``tensor`` in place over all ranks of the set, and return it."""
    reduced: torch.Tensor = synchronize(
        allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set)
    )
    return reduced


def grouped_allreduce_async(
    tensors: Tensors,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> AsyncHandle:
    """Start to reduce all ``tensors`` as one operation; they are left as they were."""
    scales = prescale_factor, postscale_factor
    return start_reduce(list(tensors), None, name, op_of(op, average), scales, process_set, None)


def grouped_allreduce_async_(
    tensors: Tensors,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> AsyncHandle:
    """Start to reduce all ``tensors`` in place as one operation."""
    tensors, scales = list(tensors), (prescale_factor, postscale_factor)
    return start_reduce(tensors, tensors, name, op_of(op, average), scales, process_set, None)


def grouped_allreduce_(
    tensors: Tensors,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """Reduce all ``tensors`` in place as one operation, and return them."""
    found: list[torch.Tensor] = synchronize(
        grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set)
    )
    return found


def sparse_allreduce_async(
    tensor: torch.Tensor, name: str, op: Any, process_set: ProcessSet = global_process_set
) -> Callable[[], torch.Tensor]:
    """Start to sum or average a sparse tensor: indices and values are gathered. The handle is a function that waits,
    and returns a new sparse tensor, in which places may occur more than once."""
    handle = start_sparse(tensor, f"{name}.sparse", op_of(op, None), process_set)

    def wait() -> torch.Tensor:
        found: torch.Tensor = synchronize(handle)
        return found

    return wait


def allgather_async(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> AsyncHandle:
    """Start to bring every rank's tensor to every rank, one behind the other along the first dimension, which may
    differ between ranks. Any dtype."""
    return start_gather([tensor], name, process_set, one)


def grouped_allgather_async(
    tensors: Tensors, name: str | None = None, process_set: ProcessSet = global_process_set
) -> AsyncHandle:
    """Start an allgather of several tensors as one operation."""
    return start_gather(list(tensors), name, process_set, None)


def broadcast_async(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> AsyncHandle:
    """Start to bring the tensor of ``root_rank`` (a rank of the job) to all ranks of the set, as a new tensor."""
    return start_broadcast(tensor, None, root_rank, name, process_set)


def broadcast_async_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> AsyncHandle:
    """Start to overwrite ``tensor`` with that of ``root_rank`` (a rank of the job)."""
    return start_broadcast(tensor, tensor, root_rank, name, process_set)


def broadcast_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """Overwrite ``tensor`` with that of ``root_rank`` (a rank of the job), and return it."""
    found: torch.Tensor = synchronize(broadcast_async_(tensor, root_rank, name, process_set))
    return found


def alltoall_async(
    tensor: torch.Tensor,
    splits: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> AsyncHandle:
    """Start to send ``splits[r]`` rows of ``tensor`` to every rank r of the set (None: equally many to each). Gives
    what has arrived, and, where splits are given, how many rows came from each rank (int32)."""
    return start_alltoall(tensor, splits, name, process_set)


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: Any = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> AsyncHandle:
    """Start to reduce ``tensor`` over all ranks of the set; each rank is given its rows, as a new tensor. The first
    ranks get one row more where they can't be dealt out equally."""
    scales = prescale_factor, postscale_factor
    return start_reducescatter([tensor], name, op, scales, process_set, one)


def grouped_reducescatter_async(
    tensors: Tensors,
    name: str | None = None,
    op: Any = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> AsyncHandle:
    """Start a reducescatter of several tensors as one operation."""
    scales = prescale_factor, postscale_factor
    return start_reducescatter(list(tensors), name, op, scales, process_set, None)


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return once all ranks of the set have called it."""
    synchronize(start("barrier", None, process_set, lambda: ({}, {})))


def join(device: int = -1) -> int:
    """This rank has no more inputs: until all ranks have joined, it contributes zeros to their allreduces. Returns the
    rank that joined last. ``device`` means nothing here."""
    return world.join()
