"""A schedule as a program: a flat table of rows with what each row has to wait for, which native code can run without
asking anybody (:mod:`commlab.transport.links`).

    opcode   send, write (receive into the buffer), reduce (receive and combine), finish (divide and round)
    peer     rank of the group
    range    numbers ``start .. stop - 1`` of the buffer: a segment
    after    the rows that must be done before

A row waits for exactly those before it that touch the same numbers: a send for what writes them (read after write), a
receive for what reads or writes them (write after read, and so that contributions are added in the schedule's order on
every run). Rows to one peer leave in the order of the table, and so do those from one peer arrive. Thus a segment
travels on as soon as it is complete, and a ring of P ranks is one long pipeline.

Why a program ends. Take the row, over all ranks, that stands first in its schedule among those that are not done. What
it waits for stands before it, and so do the rows before it on its connection; its peer's row stands at the same place,
and is as free to go. So that row can be done.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from ..chunks import Range
from .step import AnyStep, Finish, Step


class Opcode(IntEnum):
    """What a row does; the numbers are those of kernels/links/program.h."""

    SEND = 0
    WRITE = 1
    REDUCE = 2
    FINISH = 3


class Instruction(NamedTuple):
    """One line of a program."""

    opcode: Opcode
    peer: int
    """Rank of the group; 0 where the row is a FINISH."""
    segment: Range
    after: tuple[int, ...]
    """The rows that must be done before, ascending."""


class Program(NamedTuple):
    """One rank's schedule of a buffer of ``numel`` numbers among ``size`` ranks."""

    rows: tuple[Instruction, ...]
    numel: int
    size: int

    @property
    def elements_sent(self) -> int:
        """How many elements this rank sends."""
        return sum(row.segment.numel for row in self.rows if row.opcode is Opcode.SEND)

    @property
    def messages_sent(self) -> int:
        """How many segments this rank sends."""
        return sum(row.opcode is Opcode.SEND for row in self.rows)

    def table(self) -> bytes:
        """The rows as native code reads them: opcode, peer, start, stop, 64 bits each."""
        return array("Q", [number for row in self.rows for number in (row.opcode, row.peer, *row.segment)]).tobytes()

    def successors(self) -> tuple[bytes, bytes]:
        """What waits for each row, 32 bits each: for row r the numbers ``follow[first[r] : first[r + 1]]``."""
        waiting: list[list[int]] = [[] for _ in self.rows]
        for at, row in enumerate(self.rows):
            for before in row.after:
                waiting[before].append(at)
        first, follow = array("I", [0]), array("I")
        for rows in waiting:
            follow.extend(rows)
            first.append(len(follow))
        return first.tobytes(), follow.tobytes()


class _Touched(NamedTuple):
    row: int
    segment: Range


class _Compiler:
    """Rows so far, and for each cell of ``segment_numel`` numbers which of them touched its numbers last."""

    def __init__(self, segment_numel: int):
        self.segment_numel = segment_numel
        self.rows: list[Instruction] = []
        self._writes: defaultdict[int, list[_Touched]] = defaultdict(list)
        self._reads: defaultdict[int, list[_Touched]] = defaultdict(list)

    def cut(self, chunk: Range) -> list[Range]:
        """Segments end where cells end, whatever chunk they are of: so the segments of two chunks that overlap are
        equal but for their ends, and each lies in one cell. Both ends of a message cut it alike."""
        bounds = range(
            chunk.start // self.segment_numel * self.segment_numel + self.segment_numel, chunk.stop, self.segment_numel
        )
        stops = [*bounds, chunk.stop]
        return [Range(start, stop) for start, stop in zip([chunk.start, *bounds], stops, strict=True) if stop > start]

    def add(self, opcode: Opcode, peer: int, segment: Range) -> None:
        cell = segment.start // self.segment_numel
        writes, reads = self._writes[cell], self._reads[cell]
        after = {row for row, other in writes if other.overlaps(segment)}
        at = len(self.rows)
        if opcode is Opcode.SEND:
            reads.append(_Touched(at, segment))
        else:
            after |= {row for row, other in reads if other.overlaps(segment)}
            # Whoever waits for this row waits for those that it covers.
            for touched in (writes, reads):
                touched[:] = [
                    each for each in touched if each.segment.start < segment.start or segment.stop < each.segment.stop
                ]
            writes.append(_Touched(at, segment))
        self.rows.append(Instruction(opcode, peer, segment, tuple(sorted(after))))


def compile_schedule(schedule: Iterable[AnyStep], numel: int, size: int, segment_numel: int) -> Program:
    """The program of ``schedule``: of one rank among ``size``, on a buffer of ``numel`` numbers, cut into segments of
    at most ``segment_numel``. All ranks must cut alike. Cost: some microseconds a row; keep what was compiled."""
    compiler = _Compiler(segment_numel)
    for item in schedule:
        if isinstance(item, Finish):
            for segment in compiler.cut(item.chunk):
                compiler.add(Opcode.FINISH, 0, segment)
        elif isinstance(item, Step):
            incoming = compiler.cut(item.recv) if item.frm is not None else []
            outgoing = compiler.cut(item.send) if item.to is not None else []
            for at in range(max(len(incoming), len(outgoing))):
                if at < len(outgoing):
                    assert item.to is not None
                    compiler.add(Opcode.SEND, item.to, outgoing[at])
                if at < len(incoming):
                    assert item.frm is not None
                    compiler.add(Opcode.REDUCE if item.reduce else Opcode.WRITE, item.frm, incoming[at])
        else:
            raise TypeError(f"a program has no row for {item!r}")
    return Program(tuple(compiler.rows), numel, size)
