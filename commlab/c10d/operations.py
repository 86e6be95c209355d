"""The collectives of torch.distributed by commlab's: each function returns the work, or None where the operation is
left to gloo (:mod:`.fallback`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch
import torch.distributed as dist

from ..chunks import Range, adjoining, whole_at
from ..collectives.allreduce import allreduce as allreduce_now
from ..collectives.allreduce import allreduce_async
from ..collectives.delivery import bytes_of, deliver_async, deliver_at_once
from ..collectives.halves import gather_at_once, gather_chunks_async, reduce_at_once, reduce_chunks_async
from ..native.dtypes import DTYPES
from ..native.versions import count_write
from ..runtime.agreement import Signature
from ..runtime.group import Group
from ..runtime.handle import Handle
from .tensors import Tensors, aligned, as_moved, flat_of, movable, require, room_for, write, write_all
from .work import CommlabWork

Work = CommlabWork | None


class Members(Protocol):
    """What an operation needs of its process group."""

    @property
    def group(self) -> Group: ...

    def rank(self) -> int: ...

    def size(self) -> int: ...

    def begin(self, kind: str, tensors: Tensors) -> Any:
        """The span of an operation in torch's profile; None where nothing is recorded."""

    def work(
        self, handles: Sequence[Handle], value: Any, after: Callable[[], None] | None = None, span: Any = None
    ) -> CommlabWork:
        """What the caller is given."""


_KINDS: Final[Any] = dist.ReduceOp.RedOpType
OPS: Final = {
    _KINDS.SUM: "sum",
    _KINDS.AVG: "mean",
    _KINDS.MIN: "min",
    _KINDS.MAX: "max",
    _KINDS.PRODUCT: "prod",
}
"""Reductions that commlab knows; what else there is (bitwise ones, PREMUL_SUM) is gloo's."""

_OF_BOOLS: Final = {
    _KINDS.SUM: "max",
    _KINDS.MAX: "max",
    _KINDS.BOR: "max",
    _KINDS.PRODUCT: "min",
    _KINDS.MIN: "min",
    _KINDS.BAND: "min",
    _KINDS.BXOR: "sum",
}
"""The reductions of bools, as numbers 0 and 1; of the sum of an exclusive or only the last bit counts."""

_AS_INT32: Final = (torch.uint8, torch.int8, torch.int16, torch.bool)
"""Reduced as int32, and cut back: sums and products of integers are the same modulo 256 or 65536."""


class _Reduced:
    """A tensor as commlab reduces it by ``op``: another dtype, and something to do at the end, where torch's contract
    wants that. ``width``: how many of the numbers in ``flat`` are one of the tensor's."""

    __slots__ = ("divisor", "flat", "modulus", "op", "width")

    def __init__(self, tensor: torch.Tensor, op: str, size: int, modulus: int):
        self.flat, self.op, self.divisor, self.modulus, self.width = flat_of(tensor), op, 1, modulus, 1
        if tensor.is_complex():
            self.flat, self.width = torch.view_as_real(self.flat).view(-1), 2
        elif op == "mean" and not tensor.dtype.is_floating_point:
            # What NCCL does, and what programs written for it rely on: a quotient that is cut to an integer.
            self.op, self.divisor = "sum", size
        if tensor.dtype in _AS_INT32:
            self.flat = self.flat.to(torch.int32)

    def finish(self, reduced: torch.Tensor, target: torch.Tensor) -> None:
        """Write what became of the numbers into ``target``."""
        if self.divisor > 1:
            reduced = reduced.div(self.divisor, rounding_mode="trunc")
        if self.modulus:
            reduced = reduced % self.modulus
        write(target, torch.view_as_complex(reduced.view(-1, 2)) if self.width > 1 else reduced)

    def room_in(self, out: torch.Tensor) -> torch.Tensor:
        """Where to leave what is reduced for ``out``: its own memory where nothing remains to be done."""
        plain = self.divisor == self.width == 1 and self.flat.dtype is out.dtype
        if plain and out.is_contiguous():
            return out.detach().view(-1)
        return torch.empty(out.numel() * self.width, dtype=self.flat.dtype, device="cpu")

    def lies_in(self, target: torch.Tensor) -> bool:
        """Whether the numbers are reduced in place and nothing remains to be done."""
        in_place = self.flat.data_ptr() == target.data_ptr() and (self.flat.dtype is target.dtype or self.width > 1)
        return in_place and self.divisor == 1


def reduced(tensor: torch.Tensor, reduce_op: Any, size: int) -> _Reduced | None:
    """None for what commlab does not reduce."""
    kind, dtype, modulus = getattr(reduce_op, "op", reduce_op), tensor.dtype, 0
    if dtype is torch.bool:
        op = _OF_BOOLS.get(kind)
        modulus = 2 if kind == _KINDS.BXOR else 0
    else:
        op = OPS.get(kind)
    if op is None or not movable(tensor):
        return None
    if dtype.is_complex:
        if op not in ("sum", "mean") or dtype.to_real() not in DTYPES:
            return None
    elif dtype not in DTYPES and dtype not in _AS_INT32:
        return None
    return _Reduced(tensor, op, size, modulus)


def allreduce(pg: Members, tensors: Tensors, reduce_op: Any, awaited: bool) -> Work:
    numbers = reduced(tensors[0], reduce_op, pg.size()) if len(tensors) == 1 else None
    if numbers is None:
        return None
    tensor, group, span = tensors[0], pg.group, pg.begin("all_reduce", tensors)
    in_place = numbers.lies_in(tensor)
    if awaited and span is None:
        allreduce_now(numbers.flat, numbers.op, group=group)
        if not in_place:
            with torch.no_grad():
                numbers.finish(numbers.flat, tensor)
        return pg.work((), list(tensors))
    handle = allreduce_async(numbers.flat, numbers.op, group=group)
    after = None if in_place else (lambda: numbers.finish(numbers.flat, tensor))
    return pg.work((handle,), list(tensors), after, span)


def allreduce_coalesced(pg: Members, tensors: Tensors, reduce_op: Any) -> Work:
    """All tensors of a dtype in one allreduce."""
    found = [reduced(tensor, reduce_op, pg.size()) for tensor in tensors]
    if not tensors or any(numbers is None for numbers in found):
        return None
    span = pg.begin("all_reduce", tensors)
    by_dtype: dict[torch.dtype, list[tuple[torch.Tensor, _Reduced]]] = {}
    for tensor, numbers in zip(tensors, found, strict=True):
        assert numbers is not None
        by_dtype.setdefault(tensor.dtype, []).append((tensor, numbers))
    handles, wholes = [], []
    for pairs in by_dtype.values():
        with torch.no_grad():
            whole = torch.cat([numbers.flat for _, numbers in pairs])
        handles.append(allreduce_async(whole, pairs[0][1].op, group=pg.group))
        wholes.append((whole, pairs))

    def after() -> None:
        for whole, pairs in wholes:
            pieces = whole.split([numbers.flat.numel() for _, numbers in pairs])
            for (tensor, numbers), piece in zip(pairs, pieces, strict=True):
                numbers.finish(piece, tensor)

    return pg.work(handles, list(tensors), after, span)


def reduce(pg: Members, tensors: Tensors, root: int, reduce_op: Any, awaited: bool) -> Work:
    numbers = reduced(tensors[0], reduce_op, pg.size()) if len(tensors) == 1 else None
    if numbers is None:
        return None
    tensor, flat, span = tensors[0], numbers.flat, pg.begin("reduce", tensors)
    chunks = whole_at(root, flat.numel(), pg.size())
    if awaited and span is None:
        short = reduce_at_once(flat, None, chunks, numbers.op, None, "auto", pg.group)
        if short is not None and short():
            if pg.rank() == root:
                count_write(tensors)
                with torch.no_grad():
                    numbers.finish(flat, tensor)
            return pg.work((), list(tensors))
    if flat.data_ptr() == tensor.data_ptr():
        flat = flat.clone()
    handle = reduce_chunks_async(flat, chunks, numbers.op, group=pg.group)
    is_root = pg.rank() == root
    after = (lambda: numbers.finish(handle.result, tensor)) if is_root else None
    return pg.work((handle,), list(tensors), after, span)


def reduce_scatter(pg: Members, out: torch.Tensor, parts: Tensors, reduce_op: Any, awaited: bool) -> Work:
    """``parts``: what every rank gets the sum of, in rank order; or one tensor that is cut into equal parts."""
    size = pg.size()
    if not all(movable(part) for part in parts) or not movable(out) or out.dtype is not parts[0].dtype:
        return None
    with torch.no_grad():
        whole = torch.cat([flat_of(part) for part in parts]) if len(parts) > 1 else flat_of(parts[0])
    numbers = reduced(whole, reduce_op, size)
    if numbers is None:
        return None
    sizes = [part.numel() for part in parts] if len(parts) > 1 else [whole.numel() // size] * size
    require(
        pg.rank(),
        size,
        "reduce_scatter",
        sum(sizes) == whole.numel() and sizes[pg.rank()] == out.numel(),
        out,
        parts,
        sizes,
    )
    flat, span = numbers.flat, pg.begin("reduce_scatter" if len(parts) > 1 else "_reduce_scatter_base", parts)
    chunks = adjoining([part * numbers.width for part in sizes])
    if awaited and span is None:
        found = numbers.room_in(out)
        short = reduce_at_once(flat, found, chunks, numbers.op, None, "auto", pg.group)
        if short is not None and short():
            count_write((out,))
            with torch.no_grad():
                numbers.finish(found, out)
            return pg.work((), [out])
    if len(parts) == 1 and flat.data_ptr() == parts[0].data_ptr():
        flat = flat.clone()
    handle = reduce_chunks_async(flat, chunks, numbers.op, group=pg.group)
    return pg.work((handle,), [out], lambda: numbers.finish(handle.result, out), span)


class _Ending(NamedTuple):
    """What an operation comes to: what its work gives, what remains to be done, its span in torch's profile, and
    whether the caller waits for it."""

    value: Any
    after: Callable[[], None] | None
    span: Any
    awaited: bool

    @property
    def at_once(self) -> bool:
        """Whether the operation may have ended before its caller has the work."""
        return self.awaited and self.span is None

    def over(self, pg: Members) -> CommlabWork:
        """The work of what has ended."""
        if self.after is not None:
            with torch.no_grad():
                self.after()
        return pg.work((), self.value)

    def of(self, pg: Members, handle: Handle) -> CommlabWork:
        """The work of what is under way."""
        return pg.work((handle,), self.value, self.after, self.span)


def broadcast(pg: Members, tensors: Tensors, root: int, awaited: bool) -> Work:
    if len(tensors) != 1 or not movable(tensors[0]):
        return None
    tensor, span = tensors[0], pg.begin("broadcast", tensors)
    if pg.rank() != root:
        count_write(tensors)
    flat = aligned(flat_of(tensor))
    after = None if flat.data_ptr() == tensor.data_ptr() else (lambda: write(tensor, flat))
    ending = _Ending(list(tensors), after, span, awaited)
    moved = as_moved(flat, flat.numel(), pg.group)
    if moved is None:
        size_bytes = flat.numel() * flat.element_size()
        mine = Range(0, size_bytes if pg.rank() == root else 0)
        outs = [bytes_of(flat) if rank == root else _NO_BYTES for rank in range(pg.size())]
        detail = f"{size_bytes} bytes, root {root}"
        return _delivered(pg, "broadcast", detail, [bytes_of(flat)], [mine] * pg.size(), outs, ending)
    return _gathered(pg, moved, whole_at(root, moved.numel(), pg.size()), ending)


def _gathered(pg: Members, whole: torch.Tensor, chunks: Sequence[Range], ending: _Ending) -> CommlabWork:
    """Rank r's chunk of ``whole`` from rank r to all ranks."""
    if ending.at_once:
        short = gather_at_once(whole, chunks, None, "auto", pg.group, "")
        if short is not None and short():
            return ending.over(pg)
    return ending.of(pg, gather_chunks_async(whole, chunks, group=pg.group))


_NO_BYTES: Final = torch.empty(0, dtype=torch.uint8, device="cpu")


def _delivered(
    pg: Members, kind: str, detail: str, stream: Tensors, ranges: Sequence[Range], outs: Tensors, ending: _Ending
) -> CommlabWork:
    signature = Signature(kind, detail=detail)
    if ending.at_once and deliver_at_once(pg.group, signature, stream, ranges, outs):
        return ending.over(pg)
    return ending.of(pg, deliver_async(pg.group, signature, stream, ranges, outs))


def allgather_single(pg: Members, out: torch.Tensor, tensor: torch.Tensor, awaited: bool) -> Work:
    if not movable(out) or not movable(tensor) or out.dtype is not tensor.dtype:
        return None
    size, flat = pg.size(), flat_of(tensor)
    count_write((out,))
    whole = aligned(flat_of(out))
    require(pg.rank(), size, "all_gather", whole.numel() == size * flat.numel(), tensor, [out], [flat.numel()] * size)
    after = None if whole.data_ptr() == out.data_ptr() else (lambda: write(out, whole))
    ending = _Ending([out], after, pg.begin("_allgather_base", [tensor]), awaited)
    moved = as_moved(whole, flat.numel(), pg.group)
    if moved is None:
        return _parts_gathered(pg, list(whole.view(size, -1)), flat, ending)
    own = slice(pg.rank() * flat.numel(), (pg.rank() + 1) * flat.numel())
    if whole[own].data_ptr() != flat.data_ptr():
        write(whole[own], flat)
    return _gathered(pg, moved, adjoining([moved.numel() // size] * size), ending)


def allgather(pg: Members, outs: Tensors, tensor: torch.Tensor, awaited: bool) -> Work:
    """Parts may be of different sizes."""
    if not movable(tensor) or not all(movable(out) for out in outs) or len(outs) != pg.size():
        return None
    if any(out.dtype is not tensor.dtype for out in outs):
        return None
    flats = [room_for(out) for out in outs]
    count_write(outs)
    span = pg.begin("all_gather", [tensor])
    ending = _Ending([list(outs)], lambda: write_all(outs, flats), span, awaited)
    return _parts_gathered(pg, flats, flat_of(tensor), ending)


def _parts_gathered(pg: Members, flats: Tensors, flat: torch.Tensor, ending: _Ending) -> CommlabWork:
    own = bytes_of(flat)
    ranges = [Range(0, own.numel())] * pg.size()
    return _delivered(pg, "allgather", str(flat.dtype), [own], ranges, [bytes_of(part) for part in flats], ending)


def allgather_coalesced(pg: Members, outs: Sequence[Tensors], tensors: Tensors, awaited: bool) -> Work:
    """``outs[r][k]`` gets tensor k of rank r: all of a rank's tensors are one stream of bytes."""
    everything = [*tensors, *(out for each in outs for out in each)]
    if not all(movable(tensor) for tensor in everything) or len(outs) != pg.size():
        return None
    span = pg.begin("all_gather", tensors)
    stream = [bytes_of(flat_of(tensor)) for tensor in tensors]
    room = [
        torch.empty(sum(out.numel() * out.element_size() for out in each), dtype=torch.uint8, device="cpu")
        for each in outs
    ]
    own = Range(0, sum(piece.numel() for piece in stream))

    def after() -> None:
        for each, found in zip(outs, room, strict=True):
            pieces = found.split([out.numel() * out.element_size() for out in each])
            for out, piece in zip(each, pieces, strict=True):
                write(out, piece.clone().view(out.dtype))

    detail = ", ".join(str(tensor.dtype) for tensor in tensors)
    ending = _Ending(list(outs), after, span, awaited)
    return _delivered(pg, "allgather", detail, stream, [own] * pg.size(), room, ending)


_TITLES: Final = {"alltoall": "all_to_all"}
"""What gloo's spans are called in torch's profile."""


def exchange(pg: Members, kind: str, detail: str, outs: Tensors, parts: Tensors, value: Any, awaited: bool) -> Work:
    """``parts[r]`` to rank r, and into ``outs[r]`` what r has for this rank: gather and scatter are alltoalls of which
    most parts are empty."""
    if not all(movable(tensor) for tensor in (*outs, *parts)):
        return None
    flats = [room_for(out) for out in outs]
    count_write(outs)
    span = pg.begin(_TITLES.get(kind, kind), [part for part in parts if part.numel()])
    stream = [bytes_of(flat_of(part)) for part in parts]
    ranges = adjoining([piece.numel() for piece in stream])
    room = [bytes_of(flat) for flat in flats]
    ending = _Ending(value, lambda: write_all(outs, flats), span, awaited)
    return _delivered(pg, kind, detail, stream, ranges, room, ending)
