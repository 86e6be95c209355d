"""Window: on one node nobody sends. Every rank reduces its own shard straight out of everyone's memory.

    data in the window      publish where mine lie | wait | reduce shard r of all parts, write it into all parts | wait
    ordinary data           the same in blocks, through a staging area that stays in the caches (kernels/cpu/piped.h)
    up to 64 KB             the data travel in the control page: one wait, then every rank reduces everything

Cost of an allreduce of n elements: two waits; each rank reads n and writes n elements of memory, whatever P, as a copy
does; ordinary data, but for a rank's own shard, cross the caches once more each way. Nothing is sent. Rounding: all
contributions are added in rank order, in fp32 where they have 16 bits, divided, and rounded once. The result is bitwise
the same on all ranks and from run to run. When to use: always, for ranks of one node (docs/window.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import trace
from ..chunks import Range, split
from ..native.dtypes import DTYPES, OP_CODES
from ..native.library import built
from ..native.norm import Squares
from ..runtime.group import Group
from ..schedules.step import NodeStep
from ..transport.base import Pending
from .exchange import WindowWait
from .memory import NOWHERE, STAGING_BYTES, Place, Window

INLINE_BYTES: int = 0 if built is None else getattr(built, "INLINE_BYTES", 0)
"""What fits in a control page."""

SHARED_BLOCK_BYTES = STAGING_BYTES // 4
"""A rank's block of an ordinary tensor: two going in and two coming out make its staging area."""


def wait(group: Group) -> Pending:
    """Go on once all ranks have arrived as often as this one."""
    assert group.window is not None
    arrival = WindowWait(group.window, group.rank_on_node)
    while not arrival.test():
        yield arrival


def _arrive(group: Group, window: Window) -> Pending:
    """Tell the others that this rank has read and written what it had to, and wait until they say so too."""
    window.sync.arrive()
    yield from wait(group)


class _PipedWait:
    """A request: the native pipeline has come to an end; it works on while it is waited for."""

    def __init__(self, group: Group, window: Window, piped: object):
        self._group, self._window, self._piped = group, window, piped
        self._arrival = WindowWait(window, group.rank_on_node)

    def test(self) -> bool:
        return False

    def block(self, timeout_s: float) -> None:
        if self._piped.run(timeout_s * 1e6) >= 0:  # type: ignore[attr-defined]
            self._arrival.block(0.0)

    def peers(self) -> Sequence[int]:
        return self._arrival.peers()


def _piped(
    group: Group,
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
    reduction alone leaves its fp32 sums of 16-bit numbers, which are exact there; else in ``data``."""
    assert built is not None
    piped = built.Piped(
        window.sync,
        window.staging,
        SHARED_BLOCK_BYTES,
        data.data_ptr(),
        DTYPES[data.dtype][0],
        DTYPES[wire][0],
        OP_CODES[op],
        divisor,
        "reduce" in moves,
        "gather" in moves,
        [tuple(chunk) for chunk in chunks],
        0 if wide is None else wide.data_ptr(),
    )
    turn = -1
    while piped.run(0.0) >= 0:
        if piped.turn != turn:
            # Another request, so that whoever waits knows that peers are not silent, however long all of it takes.
            rest, turn = _PipedWait(group, window, piped), piped.turn
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
    assert built is not None
    code, itemsize = DTYPES[dtype]
    parts = [window.address(peer, place) + own.start * itemsize for peer, place in enumerate(places)]
    summed = squares is not None and into_dtype is torch.float32
    to, to_code = into or parts, DTYPES[into_dtype][0]
    found = built.gather_reduce(to, to_code, parts, code, own.numel, OP_CODES[op], divisor, summed)
    if squares is not None and summed:
        squares.known = found


def _places(window: Window) -> list[Place] | None:
    """Where all ranks' data lie; None if any rank's are ordinary memory."""
    places = [Place(segment, offset) for segment, offset in window.sync.places()]
    return None if any(place.segment == NOWHERE for place in places) else places


def aligned_split(numel: int, parts: int, itemsize: int) -> tuple[Range, ...]:
    """Chunks that begin on cache lines, so that no line is written by two ranks."""
    return split(numel, parts, align=max(1, 64 // itemsize))


def allreduce(
    group: Group, flat: torch.Tensor, wire: torch.dtype, op: str, divisor: float, squares: Squares | None
) -> Pending:
    """Reduce ``flat`` (1-D, contiguous, CPU) in place; ``wire``: its dtype, or 16-bit where it is fp32. Runs after the
    group's exchange, which has published where ``flat`` lies, or the data themselves. ``squares``: of the part of the
    result that this rank has made, where it lies in the window."""
    window = group.window
    assert window is not None and built is not None
    size_bytes = flat.numel() * flat.element_size()
    if size_bytes <= INLINE_BYTES and wire is flat.dtype:
        window.sync.reduce_inline(flat.data_ptr(), flat.numel(), DTYPES[flat.dtype][0], OP_CODES[op], divisor)
        group.account(NodeStep("allreduce inline", size_bytes * group.size, size_bytes))
        return
    chunks = aligned_split(flat.numel(), group.size, flat.element_size())
    own_bytes = chunks[group.rank].numel * flat.element_size()
    places = _places(window) if wire is flat.dtype else None
    with trace.span("window allreduce", "window"):
        if places is not None:
            _gather_reduce(window, places, chunks[group.rank], flat.dtype, op, divisor, (), flat.dtype, squares)
            yield from _arrive(group, window)
            group.account(NodeStep("allreduce in place", own_bytes * group.size, own_bytes * group.size))
        else:
            yield from _piped(group, window, flat, wire, op, divisor, "reduce gather", chunks)
            read_bytes = 2 * (size_bytes - own_bytes) + own_bytes * group.size
            group.account(NodeStep("allreduce through blocks", read_bytes, 2 * size_bytes))


def reduce_chunks(
    group: Group,
    flat: torch.Tensor,
    chunks: Sequence[Range],
    op: str,
    divisor: float,
    wide: torch.Tensor | None,
    squares: Squares | None,
) -> Pending:
    """Reduce this rank's chunk of ``flat`` out of all ranks' ``flat``, into ``wide`` (fp32 sums of 16-bit numbers)
    where it is given, else in place; its squares, where ``flat`` lies in the window. Other chunks are left as they were
    there."""
    window = group.window
    assert window is not None
    own = chunks[group.rank]
    read_bytes = own.numel * flat.element_size() * group.size
    places = _places(window)
    with trace.span("window reduce", "window"):
        if places is not None:
            target = wide if wide is not None else flat[own.start : own.stop]
            if own.numel:
                into = (target.data_ptr(),)
                _gather_reduce(window, places, own, flat.dtype, op, divisor, into, target.dtype, squares)
            yield from _arrive(group, window)
            group.account(NodeStep("reduce", read_bytes, own.numel * target.element_size()))
            return
        yield from _piped(group, window, flat, flat.dtype, op, divisor, "reduce", chunks, wide)
        size_bytes = flat.numel() * flat.element_size()
        own_bytes = read_bytes // group.size
        group.account(NodeStep("reduce through blocks", size_bytes - own_bytes + read_bytes, size_bytes))


def gather_chunks(group: Group, flat: torch.Tensor, chunks: Sequence[Range]) -> Pending:
    """Copy every rank's chunk into this rank's ``flat``."""
    window = group.window
    assert window is not None and built is not None
    itemsize = flat.element_size()
    theirs_bytes = (flat.numel() - chunks[group.rank].numel) * itemsize
    places = _places(window)
    with trace.span("window gather", "window"):
        if places is not None:
            for shift in range(1, group.size):
                # Everyone starts with its neighbour: no two ranks read the same memory at a time.
                peer = (group.rank + shift) % group.size
                chunk = chunks[peer]
                if chunk.numel:
                    source = window.address(peer, places[peer]) + chunk.start * itemsize
                    built.copy_through(flat.data_ptr() + chunk.start * itemsize, source, chunk.numel * itemsize)
            yield from _arrive(group, window)
            group.account(NodeStep("gather", theirs_bytes, theirs_bytes))
            return
        yield from _piped(group, window, flat, flat.dtype, "sum", 1, "gather", chunks)
        own_bytes = chunks[group.rank].numel * itemsize
        group.account(NodeStep("gather through blocks", theirs_bytes + own_bytes, theirs_bytes + own_bytes))
