"""The reductions of torch.distributed by commlab's: each function returns the work, or None where the operation is left
to gloo (:mod:`.fallback`)."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed as dist

from ..chunks import adjoining, whole_at
from ..collectives.allreduce import allreduce as allreduce_now
from ..collectives.allreduce import allreduce_async
from ..collectives.halves import reduce_at_once, reduce_chunks_async
from ..native.dtypes import DTYPES
from ..native.versions import count_write
from .members import Members, Work, WorkToBe
from .tensors import Tensors, flat_of, movable, require, write

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
    after = None if numbers.lies_in(tensor) else (lambda: numbers.finish(numbers.flat, tensor))
    to_be = WorkToBe(list(tensors), after, span, awaited)
    if to_be.at_once:
        allreduce_now(numbers.flat, numbers.op, group=group)
        return to_be.over(pg)
    return to_be.of(pg, allreduce_async(numbers.flat, numbers.op, group=group))


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
