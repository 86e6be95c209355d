"""The loops over the window. On one node nobody sends: every rank reduces its own shard straight out of everyone's
memory.

    data in the window      publish where mine lie | wait | reduce shard r of all ranks' data, write it to all | wait
    ordinary data           the same in blocks, through a staging area that stays in the caches (kernels/cpu/piped.h)
    up to 64 KB             the data travel in the control page: one wait, then every rank reduces everything

Every loop runs after the exchange of the agreement check, which has published where each rank's data lie. A loop is a
computation that returns the :class:`NodeStep` to be counted. Cost and rounding: docs/window.md.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeAlias

import torch

from .. import trace
from ..chunks import Range, split
from ..native.dtypes import DTYPES, MOVED, OP_CODES
from ..native.library import built
from ..native.norm import Squares
from ..schedules.step import NodeStep
from ..transport.base import Pending, Request
from .area import NOWHERE, Place
from .exchange import WindowWait
from .memory import STAGING_BYTES, Window

INLINE_BYTES: int = 0 if built is None else getattr(built, "INLINE_BYTES", 0)
"""What fits in a control page."""

SHARED_BLOCK_BYTES = STAGING_BYTES // 4
"""A rank's block of an ordinary tensor: two blocks going in and two coming out make its staging area."""

Loop: TypeAlias = Generator[Request, None, NodeStep]
"""A loop under way: yields the request that it waits for, and returns what it has read and written."""


def wait(window: Window) -> Pending:
    """Go on once all ranks have arrived as often as this one."""
    arrival = WindowWait(window)
    while not arrival.test():
        yield arrival


def _arrive(window: Window) -> Pending:
    """Tell the others that this rank has read and written what it had to, and wait until they say so too."""
    window.sync.arrive()
    yield from wait(window)


class _PipedWait:
    """A request: the native pipeline has come to an end; the pipeline works on while it is waited for."""

    def __init__(self, window: Window, piped: Any):
        self._piped, self._arrival = piped, WindowWait(window)

    def test(self) -> bool:
        return False

    def block(self, timeout_s: float) -> None:
        if self._piped.run(timeout_s * 1e6) >= 0:
            self._arrival.block(0.0)

    def peers(self) -> Sequence[int]:
        return self._arrival.peers()


def _piped(
    window: Window,
    data: torch.Tensor,
    wire: torch.dtype,
    op: str,
    divisor: float,
    moves: str,
    chunks: Sequence[Range],
    wide: torch.Tensor | None = None,
) -> Pending:
    """Run ordinary memory through the staging areas. ``moves``: ``"reduce"``, ``"gather"`` or both. ``wide``: where a
    reduction alone leaves its fp32 sums of 16-bit numbers, which are exact there; else the sums go to ``data``."""
    if not any(chunk.numel for chunk in chunks):
        return  # nobody waits for anybody, and a peer may be gone with its staging area
    assert built is not None
    piped = built.Piped(
        window.sync,
        window.staging,
        SHARED_BLOCK_BYTES,
        data.data_ptr(),
        MOVED[data.dtype][0],
        MOVED[wire][0],
        OP_CODES[op],
        divisor,
        "reduce" in moves,
        "gather" in moves,
        [tuple(chunk) for chunk in chunks],
        0 if wide is None else wide.data_ptr(),
    )
    tick = -1
    while piped.run(0.0) >= 0:
        if piped.tick != tick:
            # Another request, so that whoever waits knows that peers are not silent, however long all blocks take.
            rest, tick = _PipedWait(window, piped), piped.tick
        yield rest


def _gather_reduce(
    window: Window,
    places: Sequence[Place],
    own: Range,
    dtype: torch.dtype,
    op: str,
    divisor: float,
    into: Sequence[int],
    into_dtype: torch.dtype,
    squares: Squares | None,
) -> None:
    """Reduce the range ``own`` of all ranks' data into the addresses ``into``; none: into the range itself, on every
    rank."""
    assert built is not None
    code, itemsize = DTYPES[dtype]
    sources = [window.address(peer, place) + own.start * itemsize for peer, place in enumerate(places)]
    counted = squares is not None and into_dtype is torch.float32
    targets, target_code = into or sources, DTYPES[into_dtype][0]
    found = built.gather_reduce(targets, target_code, sources, code, own.numel, OP_CODES[op], divisor, counted)
    if squares is not None and counted:
        squares.known = found


def _places(window: Window) -> list[Place] | None:
    """Where all ranks' data lie; None if any rank's data are ordinary memory."""
    places = [Place(segment, offset) for segment, offset in window.sync.places()]
    return None if any(place.segment == NOWHERE for place in places) else places


def aligned_split(numel: int, count: int, itemsize: int) -> tuple[Range, ...]:
    """``count`` chunks that begin on cache lines, so that no line is written by two ranks."""
    return split(numel, count, align=max(1, 64 // itemsize))


def reduce_inline(window: Window, flat: torch.Tensor, op: str, divisor: float) -> NodeStep:
    """Reduce all of ``flat``, of at most INLINE_BYTES, in place out of the control pages, in which the exchange has
    published every rank's numbers."""
    size_bytes = flat.numel() * flat.element_size()
    window.sync.reduce_inline(flat.data_ptr(), flat.numel(), DTYPES[flat.dtype][0], OP_CODES[op], divisor)
    return NodeStep("allreduce inline", size_bytes * window.size, size_bytes)


def allreduce(
    window: Window, flat: torch.Tensor, wire: torch.dtype, op: str, divisor: float, squares: Squares | None
) -> Loop:
    """Reduce ``flat`` (1-D, contiguous, CPU) in place; ``wire``: the dtype of ``flat``, or 16-bit where ``flat`` is
    fp32. ``squares``: is given the sum of squares of the shard of the result that this rank has made, where ``flat``
    lies in the window."""
    size_bytes = flat.numel() * flat.element_size()
    chunks = aligned_split(flat.numel(), window.size, flat.element_size())
    own_bytes = chunks[window.rank].numel * flat.element_size()
    places = _places(window) if wire is flat.dtype else None
    with trace.span("window allreduce", "window"):
        if places is not None:
            _gather_reduce(window, places, chunks[window.rank], flat.dtype, op, divisor, (), flat.dtype, squares)
            yield from _arrive(window)
            return NodeStep("allreduce in place", own_bytes * window.size, own_bytes * window.size)
        yield from _piped(window, flat, wire, op, divisor, "reduce gather", chunks)
        read_bytes = 2 * (size_bytes - own_bytes) + own_bytes * window.size
        return NodeStep("allreduce through blocks", read_bytes, 2 * size_bytes)


def reduce_chunks(
    window: Window,
    flat: torch.Tensor,
    chunks: Sequence[Range],
    op: str,
    divisor: float,
    wide: torch.Tensor | None,
    squares: Squares | None,
) -> Loop:
    """Reduce this rank's chunk of ``flat`` out of all ranks' ``flat``, into ``wide`` (fp32 sums of 16-bit numbers)
    where it is given, else in place; ``squares`` of the chunk where ``flat`` lies in the window. There, other chunks
    are left as they were."""
    own = chunks[window.rank]
    read_bytes = own.numel * flat.element_size() * window.size
    places = _places(window)
    with trace.span("window reduce", "window"):
        if places is not None:
            target = wide if wide is not None else flat[own.start : own.stop]
            if own.numel:
                into = (target.data_ptr(),)
                _gather_reduce(window, places, own, flat.dtype, op, divisor, into, target.dtype, squares)
            yield from _arrive(window)
            return NodeStep("reduce", read_bytes, own.numel * target.element_size())
        yield from _piped(window, flat, flat.dtype, op, divisor, "reduce", chunks, wide)
        size_bytes = flat.numel() * flat.element_size()
        own_bytes = read_bytes // window.size
        return NodeStep("reduce through blocks", size_bytes - own_bytes + read_bytes, size_bytes)


def reduce_at(
    window: Window, places: Sequence[Place], dtype: torch.dtype, own: Range, into: torch.Tensor, divisor: float
) -> NodeStep:
    """Add up the range ``own`` of all ranks' data, numbers of ``dtype`` at ``places``, divide, and write the result to
    ``into``, all at once: every rank's data are there, and stay until the ranks meet again."""
    if own.numel:
        with trace.span("window reduce", "window"):
            _gather_reduce(window, places, own, dtype, "sum", divisor, (into.data_ptr(),), into.dtype, None)
    return NodeStep("reduce", own.numel * dtype.itemsize * window.size, own.numel * into.element_size())


def gather_chunks(window: Window, flat: torch.Tensor, chunks: Sequence[Range]) -> Loop:
    """Copy every rank's chunk into this rank's ``flat``."""
    assert built is not None
    itemsize = flat.element_size()
    theirs_bytes = (flat.numel() - chunks[window.rank].numel) * itemsize
    places = _places(window)
    with trace.span("window gather", "window"):
        if places is not None:
            for shift in range(1, window.size):
                # Everyone starts with its neighbour: no two ranks read the same memory at a time.
                peer = (window.rank + shift) % window.size
                chunk = chunks[peer]
                if chunk.numel:
                    source = window.address(peer, places[peer]) + chunk.start * itemsize
                    built.copy_through(flat.data_ptr() + chunk.start * itemsize, source, chunk.numel * itemsize)
            yield from _arrive(window)
            return NodeStep("gather", theirs_bytes, theirs_bytes)
        yield from _piped(window, flat, flat.dtype, "sum", 1, "gather", chunks)
        own_bytes = chunks[window.rank].numel * itemsize
        return NodeStep("gather through blocks", theirs_bytes + own_bytes, theirs_bytes + own_bytes)
