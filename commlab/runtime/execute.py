"""The executor: runs any schedule on any transport. The one place to make fast.

Chunks are cut into segments. While one segment is reduced by the native kernel the next ones are on their way, and a
segment that has been reduced may leave in the following step before the rest of its chunk has arrived: a ring of P
ranks is one long pipeline, not 2 (P-1) rounds.

Why that is safe. A rank posts its operations in schedule order and completes receives in the order of posting. Before
it
- sends a segment, it completes the pending receives that overlap it (read after write);
- writes a segment, by receiving or reducing into it, it waits for the pending sends that overlap it (write after read).
A relay has receives posted ahead of its sends; it sends a segment when that one has arrived.
Why it ends. Let every rank stand at a (step, segment) of its schedule. The rank that is furthest behind waits only for
messages that its peers posted at the same place or before, so it can always go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from ..chunks import Range, segments
from ..schedules.step import AnyStep, Finish, Relay, Step, with_relays
from ..transport.base import Pending, Request, Transport
from .operand import Operand, byte_view

SEGMENT_BYTES = 2 * 2**20
"""Small enough that a received segment is still in a cache when it is reduced, large enough that where ranks share
cores, and take turns at every segment, the turns vanish; measured in docs/executor.md."""

IN_FLIGHT = 4
"""Receives posted ahead. Two would do if ranks ran in step; more let a rank be late without stopping its neighbour."""


class _Receive:
    """A posted receive; ``scratch`` is None where the segment is written in place. ``finishes``: what it completes."""

    __slots__ = ("finishes", "request", "scratch", "segment")

    def __init__(self, segment: Range, request: Request, scratch: torch.Tensor | None):
        self.segment, self.request, self.scratch = segment, request, scratch
        self.finishes: list[Range] = []


class Execution:
    """One schedule under way on one rank; :meth:`run` is driven request by request.

    ``bytes_sent`` and ``messages_sent`` count what has left this rank.
    """

    def __init__(
        self, schedule: Iterator[AnyStep], operand: Operand, transport: Transport, segment_bytes: int | None = None
    ):
        self.schedule, self.operand, self.transport = schedule, operand, transport
        self.segment_numel = max(1, (segment_bytes or SEGMENT_BYTES) // operand.itemsize)
        self.bytes_sent = self.messages_sent = 0
        self._receives: deque[_Receive] = deque()
        self._sends: deque[tuple[Range, Request]] = deque()
        self._scratch: list[torch.Tensor] = []
        self._slots = 0

    def run(self) -> Pending:
        for item in with_relays(self.schedule):
            if isinstance(item, Relay):
                yield from self._relay(item)
            elif isinstance(item, Step):
                yield from self._step(item)
            elif isinstance(item, Finish):
                yield from self._finish(item.chunk)
        while self._receives:
            yield from self._complete_oldest()
        while self._sends:
            yield from self._await_send()

    def _step(self, item: Step) -> Pending:
        incoming = segments(item.recv, self.segment_numel) if item.frm is not None else ()
        outgoing = segments(item.send, self.segment_numel) if item.to is not None else ()
        for at in range(max(len(incoming), len(outgoing))):
            # The receive first: a message that finds its receive posted is written where it belongs, without a detour.
            if at < len(incoming):
                assert item.frm is not None
                yield from self._post_receive(incoming[at], item.frm, item.reduce)
            if at < len(outgoing):
                assert item.to is not None
                yield from self._post_send(outgoing[at], item.to)

    def _relay(self, item: Relay) -> Pending:
        pieces = segments(item.chunk, self.segment_numel)
        for at in range(len(pieces) + IN_FLIGHT - 1):
            if at < len(pieces):
                yield from self._post_receive(pieces[at], item.frm, item.reduce)
            if at >= IN_FLIGHT - 1:
                yield from self._post_send(pieces[at - IN_FLIGHT + 1], item.to)

    def _post_receive(self, segment: Range, frm: int, reduce: bool) -> Pending:
        while len(self._receives) >= IN_FLIGHT:
            yield from self._complete_oldest()
        if reduce:
            if not self._scratch and self._slots < IN_FLIGHT:
                self._slots += 1
                numel = min(self.segment_numel, self.operand.buffer.numel())
                self._scratch.append(torch.empty(numel, dtype=self.operand.buffer.dtype, device="cpu"))
            scratch = self._scratch.pop()
            target = byte_view(scratch)[: segment.numel * self.operand.itemsize]
            self._receives.append(_Receive(segment, self.transport.irecv(target, frm), scratch))
        else:
            yield from self._complete_receives(segment)
            yield from self._await_sends(segment)
            self._receives.append(_Receive(segment, self.transport.irecv(self.operand.view(segment), frm), None))

    def _post_send(self, segment: Range, to: int) -> Pending:
        yield from self._complete_receives(segment)
        while self._sends and self._sends[0][1].test():
            self._sends.popleft()
        data = self.operand.view(segment)
        self._sends.append((segment, self.transport.isend(data, to)))
        self.bytes_sent += data.size
        self.messages_sent += 1

    def _complete_receives(self, segment: Range) -> Pending:
        """Complete all receives up to the last one that writes into ``segment``, or after which some of ``segment`` is
        finished."""
        for count in range(len(self._receives), 0, -1):
            receive = self._receives[count - 1]
            if receive.segment.overlaps(segment) or any(finished.overlaps(segment) for finished in receive.finishes):
                for _ in range(count):
                    yield from self._complete_oldest()
                return

    def _complete_oldest(self) -> Pending:
        receive = self._receives[0]
        while not receive.request.test():
            yield receive.request
        self._receives.popleft()
        if receive.scratch is not None:
            yield from self._await_sends(receive.segment)
            self.operand.reduce(receive.segment, receive.scratch)
            self._scratch.append(receive.scratch)
        for segment in receive.finishes:
            yield from self._await_sends(segment)
            self.operand.finish(segment)

    def _finish(self, chunk: Range) -> Pending:
        """Each segment is finished by the last pending receive that adds to it, so that it can leave before its
        neighbours."""
        for segment in segments(chunk, self.segment_numel):
            for receive in reversed(self._receives):
                if receive.segment.overlaps(segment):
                    receive.finishes.append(segment)
                    break
            else:
                yield from self._await_sends(segment)
                self.operand.finish(segment)

    def _await_sends(self, segment: Range) -> Pending:
        while any(sent.overlaps(segment) for sent, _ in self._sends):
            yield from self._await_send()

    def _await_send(self) -> Pending:
        _, request = self._sends[0]
        while not request.test():
            yield request
        self._sends.popleft()
