"""The loops over the window. On one node nobody sends: every rank reduces its own shard straight out of everyone's
memory.

    data in the window      publish where mine lie | wait | reduce shard r of all ranks' data, write it to all | wait
    ordinary data           the same in blocks, through a staging area that stays in the caches (kernels/cpu/piped.h)
    up to 64 KB             the data travel in the control page: one wait, then every rank reduces everything
    up to a room            the same out of the staging areas (kernels/cpu/node_collective.h)

Every loop runs after the exchange of the agreement check, which has published where each rank's data lie. A loop is a
computation that returns the :class:`NodeStep` to be counted. Cost and rounding: docs/window.md.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Literal, TypeAlias

import torch

from .. import trace
from ..chunks import Range, split
from ..native.dtypes import DTYPES, MOVED, OP_CODES
from ..native.library import built
from ..native.norm import Squares
from ..schedules.step import NodeStep
from ..transport.base import Pending, Request
from .area import Place
from .exchange import Attachment, WindowWait
from .memory import ROOM_BYTES, Window

INLINE_BYTES: int = 0 if built is None else getattr(built, "INLINE_BYTES", 0)
"""What fits in a control page."""

CROWDED_BYTES = 8 * 2**20
"""The most that all ranks of a node together read in rooms where they share cores, one after the other: up to here that
takes less time than the two waits that it saves. The figures are in docs/algorithms/window.md."""


def fits_rooms(size_bytes: int, size: int, crowded: bool) -> bool:
    """Whether an allreduce of ``size`` ranks goes through the rooms, where each reads the numbers of all ranks, and not
    3 - 2 / P times as many as it has. ``crowded``: they share cores, so that a wait costs some 30 us and not one."""
    return size_bytes <= ROOM_BYTES and (size <= 3 or (crowded and size_bytes * size**2 <= CROWDED_BYTES))


Moves: TypeAlias = Literal["allreduce", "reduce", "gather"]
"""What a :class:`Collective` does with the numbers."""

Loop: TypeAlias = Generator[Request, None, NodeStep]
"""A loop under way: yields the request that it waits for, and returns what it has read and written."""


def wait(window: Window) -> Pending:
    """Go on once all ranks have arrived as often as this one."""
    arrival = WindowWait(window)
    while not arrival.test():
        yield arrival


class _NativeWait:
    """A request: what native code does has come to an end; it works on while it is waited for."""

    def __init__(self, window: Window, native: Any):
        self._native, self._arrival = native, WindowWait(window)

    def test(self) -> bool:
        return False

    def block(self, timeout_s: float) -> None:
        if self._native.run(timeout_s * 1e6) >= 0:
            self._arrival.block(0.0)

    def peers(self) -> Sequence[int]:
        return self._arrival.peers()


def driven(window: Window, native: Any) -> Pending:
    """Bring what native code has under way (``run(timeout_us)``, ``tick``) to its end."""
    tick = -1
    while native.run(0.0) >= 0:
        if native.tick != tick:
            # Another request, so that whoever waits knows that peers are not silent, however long all of it takes.
            rest, tick = _NativeWait(window, native), native.tick
        yield rest


class Collective:
    """An allreduce or one of its halves, as native code does it (kernels/cpu/node_collective.h).

    ``dtype``: of the numbers; ``wire``: the same, or 16-bit where they are fp32. ``chunks``: one per rank.
    ``crowded``: whether ranks share cores. It serves all calls of one shape, one after the other."""

    def __init__(
        self,
        window: Window,
        moves: Moves,
        dtype: torch.dtype,
        wire: torch.dtype,
        op: str,
        divisor: float,
        chunks: Sequence[Range],
        crowded: bool = False,
    ):
        assert built is not None
        self.window, self.moves, self._itemsize = window, moves, dtype.itemsize
        self._numel = max((chunk.stop for chunk in chunks), default=0)
        self._own = chunks[window.rank]
        self._empty = not any(chunk.numel for chunk in chunks)
        size_bytes = self._numel * dtype.itemsize
        readers = window.size if moves == "allreduce" else 1
        self.to_rooms = wire is dtype and fits_rooms(size_bytes, readers, crowded)
        """Whether numbers that nobody has in the window go through the rooms, all at once."""
        self.native: Any = built.NodeCollective(
            window.sync,
            window.mapped,
            MOVED[dtype][0],
            MOVED[wire][0],
            OP_CODES[op],
            divisor,
            moves != "gather",
            moves != "reduce",
            [tuple(chunk) for chunk in chunks],
            self.to_rooms,
        )
        self.steps = self._steps()
        """What it reads and writes, by the way that it goes."""

    def _steps(self) -> dict[int, NodeStep]:
        size, whole = self.window.size, self._numel * self._itemsize
        own = self._own.numel * self._itemsize
        theirs, native = whole - own, self.native
        if self.moves == "allreduce":
            return {
                native.IN_PLACE: NodeStep("allreduce in place", own * size, own * size),
                native.AT_ONCE: NodeStep("allreduce at once", whole * (size + 1), 2 * whole),
                native.PIPED: NodeStep("allreduce through blocks", 2 * theirs + own * size, 2 * whole),
            }
        if self.moves == "reduce":
            return {
                native.IN_PLACE: NodeStep("reduce", own * size, own),
                native.AT_ONCE: NodeStep("reduce at once", theirs + own * size, whole),
                native.PIPED: NodeStep("reduce through blocks", theirs + own * size, whole),
            }
        return {
            native.IN_PLACE: NodeStep("gather", theirs, theirs),
            native.AT_ONCE: NodeStep("gather at once", whole, whole),
            native.PIPED: NodeStep("gather through blocks", whole, whole),
        }

    def announced(self, flat: torch.Tensor) -> Attachment:
        """What this rank publishes next: where its numbers lie in the window, or that they don't; then they may be in
        its room."""
        place = self.window.locate(flat)
        if place is not None:
            return Attachment(*place)
        return Attachment(*self.native.shown(flat.data_ptr()))

    def run(self, flat: torch.Tensor, out: torch.Tensor | None = None, squares: Squares | None = None) -> Loop:
        """Do it on ``flat`` (1-D, contiguous, CPU), in place, but for a reduction that has an ``out``. All ranks have
        published where theirs lie. ``out``: of the same dtype, or fp32, the sums of 16-bit numbers, unrounded.
        ``squares``: is given the sum of squares of what this rank has reduced where the numbers lie in the window."""
        native, window = self.native, self.window
        if self._empty:  # nobody waits for anybody, and a peer may be gone with its memory
            return NodeStep(self.moves, 0, 0)
        way = native.way
        for peer, place in enumerate(window.sync.places()):
            # Mapped before this rank arrives again: a peer whose last operation it is may end then.
            if way == native.IN_PLACE:
                window.address(peer, Place(*place))
            else:
                window.staging_of(peer)
        with trace.span(f"window {self.moves}", "window"):
            result = flat if out is None else out
            squared = squares is not None and result.dtype is torch.float32 and way == native.IN_PLACE
            native.move(flat.data_ptr(), 0 if out is None else out.data_ptr(), MOVED[result.dtype][0], squared)
            if squares is not None and squared:
                squares.known = native.squares
            return (yield from self.go_on())

    def go_on(self) -> Loop:
        """Bring what is under way to its end."""
        way = self.native.way
        yield from driven(self.window, self.native)
        return self.steps[way]


def aligned_split(numel: int, count: int, itemsize: int) -> tuple[Range, ...]:
    """``count`` chunks that begin on cache lines, so that no line is written by two ranks."""
    return split(numel, count, align=max(1, 64 // itemsize))


def reduce_inline(window: Window, flat: torch.Tensor, op: str, divisor: float) -> NodeStep:
    """Reduce all of ``flat``, of at most INLINE_BYTES, in place out of the control pages, in which the exchange has
    published every rank's numbers."""
    window.sync.reduce_inline(flat.data_ptr(), flat.numel(), DTYPES[flat.dtype][0], OP_CODES[op], divisor)
    return NodeStep("allreduce inline", flat.nbytes * window.size, flat.nbytes)


def reduce_at(
    window: Window, places: Sequence[Place], dtype: torch.dtype, own: Range, into: torch.Tensor, divisor: float
) -> NodeStep:
    """Add up the range ``own`` of all ranks' data, numbers of ``dtype`` at ``places``, divide, and write the result to
    ``into``, all at once: every rank's data are there, and stay until the ranks meet again."""
    assert built is not None
    if own.numel:
        with trace.span("window reduce", "window"):
            sources = [window.address(peer, place) + own.start * dtype.itemsize for peer, place in enumerate(places)]
            into_code, code = DTYPES[into.dtype][0], DTYPES[dtype][0]
            sum_code = OP_CODES["sum"]
            built.gather_reduce([into.data_ptr()], into_code, sources, code, own.numel, sum_code, divisor, False)
    return NodeStep("reduce", own.numel * dtype.itemsize * window.size, own.numel * into.element_size())
