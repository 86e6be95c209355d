"""What a rank announces of an operation, and whether the ranks' announcements of one name fit together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..errors import UsageError

REDUCING = ("allreduce", "reducescatter")
MOVING = ("allgather", "broadcast", "alltoall")
_NOT_WHILE_JOINED = ("allgather", "broadcast", "alltoall", "reducescatter")

_SUMMED = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float16,
    torch.bfloat16: torch.bfloat16,
    torch.int32: torch.int32,
    torch.int64: torch.int64,
    torch.uint8: torch.int32,
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.bool: torch.int32,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
"""By the dtype of a tensor: the dtype in which commlab reduces it. Small integers are cut back at the end, which is the
same modulo 2^8 or 2^16."""

FLOATS = frozenset(dtype for dtype in _SUMMED if dtype.is_floating_point)
"""Of these there is every reduction."""


class Announcement(NamedTuple):
    """One operation of one rank, as the others have to know of it. Everything in it is JSON."""

    kind: str
    """allreduce, allgather, broadcast, alltoall, reducescatter, barrier, or the making of a process set."""
    name: str
    """The name that ranks match, unique among this rank's operations under way."""
    dtypes: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    """One for each tensor; a grouped operation has several."""
    op: str = ""
    root: int = -1
    """The root's rank in the job."""
    scales: tuple[float, float] = (1.0, 1.0)
    """What each contribution, and the result, are multiplied by."""
    splits: tuple[int, ...] = ()
    """Of an alltoall: how many rows each rank gets."""
    absent: bool = False
    """This rank has nothing to contribute, and takes the others' result: a gradient that was not computed here."""
    detail: str = ""
    """What else must agree."""
    named: bool = True
    """Whether the caller chose the name, so that it will come again."""
    refused: str = ""
    """Why this rank can't do it; empty where it can."""

    def text(self) -> str:
        """The tensors, and what is done with them, for messages."""
        shown = zip(self.dtypes[:4], self.shapes[:4], strict=True)
        tensors = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in shown)
        if len(self.shapes) > 4:
            tensors += f", ... ({len(self.shapes)} tensors)"
        more = [self.op] if self.op else []
        more += [f"root {self.root}"] if self.root >= 0 else []
        more += [f"scaled by {self.scales[0]:g} before and {self.scales[1]:g} after"] if self.scales != (1, 1) else []
        more += [self.detail] if self.detail else []
        return " ".join(
            [self.kind, *([f"of {tensors}"] if tensors else []), *([f"({', '.join(more)})"] if more else [])]
        )


def announcement_of(found: list[Any]) -> Announcement:
    """A request that has travelled as JSON."""
    made = Announcement(*found)
    return made._replace(
        dtypes=tuple(made.dtypes),
        shapes=tuple(tuple(shape) for shape in made.shapes),
        scales=(made.scales[0], made.scales[1]),
        splits=tuple(made.splits),
    )


def _compared(request: Announcement) -> tuple[Any, ...]:
    """What must be equal on all ranks."""
    shapes: Any = request.shapes
    if request.kind in ("allgather", "alltoall"):
        # The first dimension is a rank's own.
        shapes = tuple((len(shape), shape[1:]) for shape in shapes)
    return request.kind, request.dtypes, shapes, request.op, request.root, request.scales, request.detail


def refusal(rank: int, name: str, requests: Mapping[int, Announcement], joined: set[int]) -> str:
    """Why the ranks' requests of one name can't be carried out; empty where they can. The same words on all ranks but
    for ``rank``, whose message it is."""
    first = next(iter(requests.values()))
    if not (joined or first.refused or first.absent) and all(request == first for request in requests.values()):
        return ""
    refused = [request.refused for _, request in sorted(requests.items()) if request.refused]
    if refused:
        return f"rank {rank}: {name!r} was refused: {'; '.join(refused)}"
    first = next((each for each in requests.values() if not each.absent), next(iter(requests.values())))
    if joined and first.kind in _NOT_WHILE_JOINED:
        return (
            f"rank {rank}: {first.kind} {name!r}: {_ranks(sorted(joined))} called join(), and while ranks have joined "
            "there are only allreduce and barrier; call join() after the last operation of another kind"
        )
    sides: dict[tuple[Any, ...], list[int]] = {}
    for peer, request in sorted(requests.items()):
        compared = _compared(request)
        # Who contributes nothing may not know whether the others' gradient is sparse.
        if not request.absent:
            sides.setdefault(compared, []).append(peer)
    if len(sides) > 1:
        texts = "; ".join(f"{_ranks(peers)}: {requests[peers[0]].text()}" for peers in sides.values())
        return (
            f"rank {rank}: ranks disagree about {name!r}: {texts}. Nothing was sent; all ranks must give the same "
            "operation, dtype and shape under one name"
        )
    return ""


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def summed_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which numbers of ``dtype`` are reduced; None where they can't be."""
    return _SUMMED.get(dtype)


def require_reducible(rank: int, kind: str, tensor: torch.Tensor, op: str) -> None:
    """UsageError for a reduction that nobody could do."""
    if tensor.dtype in FLOATS:
        return
    dtype = str(tensor.dtype).removeprefix("torch.")
    where = f"rank {rank}: {kind} of {dtype}{list(tensor.shape)}"
    if tensor.dtype not in _SUMMED:
        known = ", ".join(str(each).removeprefix("torch.") for each in _SUMMED)
        raise UsageError(f"{where}: dtypes that are reduced: {known}; cast it")
    if tensor.is_complex() and op not in ("sum", "mean"):
        raise UsageError(f"{where}: complex numbers have no {op}; there are Sum and Average")
    if tensor.dtype is torch.bool and op not in ("sum", "min", "max", "prod"):
        raise UsageError(f"{where}: truth values have no {op}; there are Sum (or), Product (and), Min and Max")
    if op == "adasum" and not tensor.is_floating_point():
        raise UsageError(f"{where}: Adasum is for floating-point tensors")


@lru_cache(maxsize=16384)
def described(dtype: str, shape: tuple[int, ...]) -> tuple[torch.dtype, torch.Size, int]:
    """Dtype, shape, and how many numbers, of a tensor that a request has."""
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return found, torch.Size(shape), torch.Size(shape).numel()


@lru_cache(maxsize=16384)
def size_bytes_of(dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> int:
    """How many bytes the tensors of a request have."""
    found = (described(dtype, shape) for dtype, shape in zip(dtypes, shapes, strict=True))
    return sum(dtype.itemsize * numel for dtype, _, numel in found)
