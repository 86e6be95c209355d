"""How an operation on tensors is started: its arguments are checked, it gets its name, and the engine takes it.

What one rank can't accept is announced under the operation's name, so that the other ranks fail too instead of waiting
for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any

import torch

from ...collectives.tensors import described, readable, surely_writable, writable
from ...errors import UsageError
from ...runtime.recording import recorder, refusal
from .. import world
from ..announcement import FLOATS, Announcement, require_reducible
from ..process_sets import ProcessSet, global_process_set
from ..submission import Submission

Tensors = Sequence[torch.Tensor]
Finish = Callable[[list[torch.Tensor]], Any] | None


class ReduceOp(IntEnum):
    """What is made of the ranks' numbers."""

    Average = 0
    Sum = 1
    Adasum = 2
    Min = 3
    Max = 4
    Product = 5


Average, Sum, Adasum, Min, Max, Product = ReduceOp
_OPS = {Average: "mean", Sum: "sum", Adasum: "adasum", Min: "min", Max: "max", Product: "prod"}


class AsyncHandle(int):
    """What an asynchronous operation gives to its caller, for :func:`synchronize` and :func:`poll`."""

    submission: Submission
    number: int


_handles = 0


def op_of(op: Any, average: bool | None) -> ReduceOp:
    """The reduction, by ``op`` or by the older argument ``average``."""
    if op is not None:
        if average is not None:
            raise ValueError("The op parameter supersedes average. Please provide only one of them.")
        try:
            return ReduceOp(op)
        except ValueError:
            raise UsageError(f"op {op!r}: there are Average, Sum, Adasum, Min, Max and Product") from None
    return Average if average is None or average else Sum


def start(
    kind: str,
    name: str | None,
    process_set: ProcessSet,
    build: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
    matched: str | None = None,
) -> AsyncHandle:
    """Start an operation. ``build()`` gives what the request and the submission have beside kind and name, or raises
    an error, which is raised here, and known to the other ranks of the set. ``matched``: the kind under which ranks
    match the name, where it is another one."""
    number = _set_of(process_set, kind)
    named = name is not None
    full = f"{matched or kind}.{name}" if named else world.require().next_name(number, kind)
    try:
        request, what = build()
        submission = Submission(Announcement(kind, full, named=named, **request), **what)
    except Exception as error:
        _submit(number, Submission(Announcement(kind, full, refused=str(error), named=False)))
        raise
    return _submit(number, submission)


def _submit(number: int, submission: Submission) -> AsyncHandle:
    global _handles
    if (by := recorder()) and not submission.request.refused and world.size() > 1:
        request = submission.request
        error = refusal(world.rank(), request.kind, by)
        _submit(number, Submission(Announcement(request.kind, request.name, refused=str(error), named=False)))
        raise error
    world.require().engine.submit(number, [submission])
    _handles += 1
    handle = AsyncHandle(_handles)
    handle.submission, handle.number = submission, number
    return handle


def _set_of(process_set: ProcessSet, kind: str) -> int:
    here = world.require()
    if process_set is global_process_set:
        return 0
    if not isinstance(process_set, ProcessSet):
        raise UsageError(f"rank {here.group.rank}: {kind}: process_set is a {type(process_set).__name__}")
    if not process_set.included():
        raise UsageError(f"rank {here.group.rank}: {kind} in {process_set!r}, which this rank is not in")
    number = process_set.process_set_id
    assert number is not None
    return number


def _described(tensors: Tensors, outputs: Tensors | None = None) -> dict[str, Any]:
    """Dtypes and shapes, as a request has them. UsageError for no tensor at all, for what has no dense numbers, and for
    ``outputs`` that can't be written in place."""
    if not tensors:
        raise UsageError(f"rank {world.rank()}: a grouped operation of no tensors; call it with one at least, or not")
    for tensor in tensors:
        if outputs is tensors and surely_writable(tensor):
            continue
        if isinstance(tensor, torch.Tensor) and tensor.layout is not torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise UsageError(
                f"rank {world.rank()}: a {layout} tensor has no dense block of numbers; use sparse_allreduce_async for "
                "a sparse one, or .to_dense()"
            )
        readable(tensor, f"rank {world.rank()}: {described(tensor)}")
    for output in outputs or ():
        if surely_writable(output):
            continue
        writable(output, f"rank {world.rank()}: {described(output)}")
    dtypes = tuple(str(each.dtype).removeprefix("torch.") for each in tensors)
    return {"dtypes": dtypes, "shapes": tuple(tuple(each.shape) for each in tensors)}


def _with_rows(kind: str, tensors: Tensors) -> dict[str, Any]:
    found = _described(tensors)
    if any(not tensor.dim() for tensor in tensors):
        raise UsageError(
            f"rank {world.rank()}: {kind} of a scalar: tensors are cut along their first dimension, and a scalar has "
            "none; give tensor.reshape(1)"
        )
    return found


def _rooms(tensors: Tensors) -> list[torch.Tensor]:
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]


def one(found: list[torch.Tensor]) -> torch.Tensor:
    """What an operation on one tensor gives."""
    return found[0]


def start_reduce(
    tensors: Tensors,
    outputs: Tensors | None,
    name: str | None,
    op: ReduceOp,
    scales: tuple[float, float],
    process_set: ProcessSet,
    finish: Finish,
    absent: bool = False,
) -> AsyncHandle:
    """An allreduce of ``tensors`` into ``outputs`` (None: new tensors). ``absent``: this rank contributes nothing."""

    def build() -> tuple[dict[str, Any], dict[str, Any]]:
        request = _described(tensors, outputs)
        for tensor in tensors:
            require_reducible(world.rank(), "allreduce", tensor, _OPS[op])
        request |= {"op": _OPS[op], "scales": (float(scales[0]), float(scales[1])), "absent": absent}
        sent: Tensors = [] if absent else tensors
        return request, {"tensors": sent, "outputs": _rooms(tensors) if outputs is None else outputs, "finish": finish}

    return start("allreduce", name, process_set, build)


def start_gradient(
    tensor: torch.Tensor,
    absent: bool,
    name: str,
    op: ReduceOp,
    scales: tuple[float, float],
    process_set: ProcessSet,
) -> AsyncHandle:
    """An allreduce of a gradient in place. ``absent``: this rank has none, contributes nothing, and takes the result.
    The handle gives None, and ``tensor`` is as it was, where no rank has one; a sparse tensor where the others' are
    sparse."""

    def finish(found: list[torch.Tensor]) -> torch.Tensor | None:
        if len(found) == 2:
            return _sparse(found, tensor.shape, op, process_set)
        return found[0] if found else None

    tensors = [tensor]
    if surely_writable(tensor) and tensor.dtype in FLOATS:
        # A step has many small gradients, the same ones each time: nothing of this is worked out twice.
        request = _gradient_request(f"allreduce.{name}", tensor.dtype, tensor.shape, _OPS[op], scales, absent)
        submission = Submission(request, () if absent else tensors, tensors, finish)
        return _submit(_set_of(process_set, "allreduce"), submission)
    return start_reduce(tensors, tensors, name, op, scales, process_set, finish, absent)


@lru_cache(maxsize=16384)
def _gradient_request(
    name: str, dtype: torch.dtype, shape: torch.Size, op: str, scales: tuple[float, float], absent: bool
) -> Announcement:
    dtypes = (str(dtype).removeprefix("torch."),)
    return Announcement("allreduce", name, dtypes, (tuple(shape),), op, scales=scales, absent=absent)


def start_sparse(
    tensor: torch.Tensor, name: str, op: ReduceOp, process_set: ProcessSet, matched: str | None = None
) -> AsyncHandle:
    """A sum or an average of sparse tensors: indices and values are gathered, and give a new sparse tensor."""
    if op not in (Average, Sum):
        raise UsageError(f"rank {world.rank()}: sparse tensors are summed or averaged, not {op.name}")
    found = tensor if tensor.is_coalesced() else tensor.coalesce()
    pieces = [found._indices().transpose(0, 1).contiguous(), found._values()]

    def finish(gathered: list[torch.Tensor]) -> torch.Tensor:
        return _sparse(gathered, tensor.shape, op, process_set)

    return start_gather(pieces, name, process_set, finish, matched)


def _sparse(gathered: list[torch.Tensor], shape: torch.Size, op: ReduceOp, process_set: ProcessSet) -> torch.Tensor:
    indices, values = gathered
    if op == Average:
        values = values / len(process_set.ranks or ())
    return torch.sparse_coo_tensor(indices.transpose(0, 1), values, shape, check_invariants=False, device=values.device)


def start_gather(
    tensors: Tensors, name: str | None, process_set: ProcessSet, finish: Finish, matched: str | None = None
) -> AsyncHandle:
    """An allgather; a scalar is one row."""

    def build() -> tuple[dict[str, Any], dict[str, Any]]:
        request = _described(tensors)
        rows = [tensor if tensor.dim() else tensor.reshape(1) for tensor in tensors]
        request["shapes"] = tuple(tuple(each.shape) for each in rows)
        return request, {"tensors": rows, "finish": finish}

    return start("allgather", name, process_set, build, matched)


def start_broadcast(
    tensor: torch.Tensor, output: torch.Tensor | None, root_rank: int, name: str | None, process_set: ProcessSet
) -> AsyncHandle:
    """A broadcast into ``output`` (None: a new tensor). ``root_rank``: a rank of the job."""

    def build() -> tuple[dict[str, Any], dict[str, Any]]:
        written = output is not None and (root_rank != world.rank() or output is not tensor)
        request = _described([tensor], [output] if written and output is not None else None)
        ranks = process_set.ranks or []
        if root_rank not in ranks:
            raise UsageError(f"rank {world.rank()}: broadcast with root {root_rank!r}; the set has the ranks {ranks}")
        outputs = _rooms([tensor]) if output is None else [output]
        return request | {"root": int(root_rank)}, {"tensors": [tensor], "outputs": outputs, "finish": one}

    return start("broadcast", name, process_set, build)


def start_alltoall(tensor: torch.Tensor, splits: Any, name: str | None, process_set: ProcessSet) -> AsyncHandle:
    """An alltoall of rows."""

    def finish(found: list[torch.Tensor]) -> Any:
        device = splits.device if isinstance(splits, torch.Tensor) else torch.device("cpu")
        return found[0] if splits is None else (found[0], found[1].to(device))

    def build() -> tuple[dict[str, Any], dict[str, Any]]:
        request = _with_rows("alltoall", [tensor])
        asked = _splits(tensor, splits, len(process_set.ranks or ()))
        return request | {"splits": asked}, {"tensors": [tensor], "finish": finish}

    return start("alltoall", name, process_set, build)


def _splits(tensor: torch.Tensor, splits: Any, size: int) -> tuple[int, ...]:
    rows, where = tensor.shape[0], f"rank {world.rank()}: alltoall of {list(tensor.shape)} among {size} ranks"
    if splits is None:
        if rows % size:
            raise UsageError(f"{where}: the rows can't be dealt out equally; give splits")
        return (rows // size,) * size
    if isinstance(splits, torch.Tensor) and (splits.is_floating_point() or splits.is_complex()):
        raise UsageError(f"{where}: splits of {splits.dtype} are no counts; give integers")
    asked = tuple(int(each) for each in splits)
    if len(asked) != size or min(asked) < 0 or sum(asked) > rows:
        raise UsageError(f"{where} in {list(asked)}: give one count of rows for each rank, {rows} in all at most")
    return asked


def start_reducescatter(
    tensors: Tensors,
    name: str | None,
    op: Any,
    scales: tuple[float, float],
    process_set: ProcessSet,
    finish: Finish,
) -> AsyncHandle:
    """A reducescatter along the first dimension."""

    def build() -> tuple[dict[str, Any], dict[str, Any]]:
        reduction = op_of(op, None)
        if reduction == Adasum:
            raise UsageError(f"rank {world.rank()}: reducescatter knows no Adasum; use allreduce")
        request = _with_rows("reducescatter", tensors)
        for tensor in tensors:
            require_reducible(world.rank(), "reducescatter", tensor, _OPS[reduction])
        request |= {"op": _OPS[reduction], "scales": (float(scales[0]), float(scales[1]))}
        return request, {"tensors": tensors, "finish": finish}

    return start("reducescatter", name, process_set, build)


def synchronize(handle: Any) -> Any:
    """Wait for an asynchronous operation; returns what it gives. HorovodInternalError where it failed. The callables of
    sparse operations are called."""
    if isinstance(handle, AsyncHandle):
        if world.is_initialized():
            world.require().engine.urge(handle.number, handle.submission)
        return handle.submission.result()
    if callable(handle):
        return handle()
    raise ValueError(f"{handle!r} is no handle of an operation of this process")


def poll(handle: Any) -> bool:
    """Whether an asynchronous operation has ended, so that :func:`synchronize` will not wait."""
    if not isinstance(handle, AsyncHandle):
        raise ValueError(f"{handle!r} is no handle of an operation of this process")
    return handle.submission.ended
