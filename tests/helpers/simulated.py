"""Run schedules on the simulated network, round robin or as badly as a real network may behave."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

from torch import Tensor

from commlab.runtime.execute import Execution
from commlab.runtime.operand import Operand
from commlab.schedules.step import Finish, Schedule, Step
from commlab.transport.base import Bytes
from commlab.transport.sim import SimNetwork, SimRequest


def simulate(
    schedule_of: Callable[[int], Schedule],
    operands: Sequence[Operand | Tensor],
    segment_bytes: int | None = None,
    network: SimNetwork | None = None,
    execution: type[Execution] = Execution,
) -> list[Execution]:
    """Run ``schedule_of(rank)`` on ``operands[rank]`` for all ranks; a tensor is summed. Returns the executions."""
    network = network or SimNetwork(len(operands))
    executions = [
        execution(
            schedule_of(rank), Operand(operand) if isinstance(operand, Tensor) else operand, transport, segment_bytes
        )
        for rank, (operand, transport) in enumerate(zip(operands, network.transports(), strict=True))
    ]
    network.run([each.run() for each in executions])
    return executions


class _Send(SimRequest):
    __slots__ = ("copy",)

    def __init__(self, data: Bytes, peer: int, buffered: bool):
        super().__init__(data, peer)
        self.copy, self.done = data.copy(), buffered


class AdverseNetwork(SimNetwork):
    """Ranks run and messages arrive in random order, some sends are buffered and some are not, and memory is used as
    MPI allows.

    From its posting on, a receive's memory holds noise until the message is complete. A send that is not buffered
    reads its memory as late as it can, and fails if that was changed meanwhile. ``seed`` makes a run repeatable.
    """

    def __init__(self, size: int, seed: int):
        super().__init__(size)
        self._random = random.Random(seed)
        self._flying: list[tuple[_Send, SimRequest, str]] = []

    def post(self, frm: int, to: int, data: Bytes, sending: bool) -> SimRequest:
        request = _Send(data, to, self._random.random() < 0.5) if sending else SimRequest(data, frm)
        if sending:
            self.messages.append((frm, to, data.size))
        else:
            data[:] = self._random.randrange(256)
        mine, theirs = (self._sends, self._receives) if sending else (self._receives, self._sends)
        partners = theirs.get((frm, to))
        if not partners:
            mine.setdefault((frm, to), deque()).append(request)
            return request
        partner = partners.popleft()
        send, receive = (request, partner) if sending else (partner, request)
        assert isinstance(send, _Send)
        assert send.data.size == receive.data.size, (
            f"rank {frm} sends {send.data.size} B, rank {to} expects {receive.data.size} B"
        )
        self._flying.append((send, receive, f"{frm} -> {to}"))
        return request

    def _deliver(self) -> None:
        send, receive, way = self._flying.pop(self._random.randrange(len(self._flying)))
        assert send.done or (send.data == send.copy).all(), (
            f"message {way}: its memory was overwritten before it had left"
        )
        receive.data[:] = send.copy
        send.done = receive.done = True

    def run(self, ranks: Iterable[Generator[Any, None, Any]]) -> list[Any]:
        running = dict(enumerate(ranks))
        waiting: dict[int, Any] = {}
        while running or self._flying:
            ready = [rank for rank in running if rank not in waiting or waiting[rank].test()]
            if not ready and not self._flying:
                raise RuntimeError(f"deadlock: ranks {sorted(running)}")
            if self._flying and (not ready or self._random.random() < 0.4):
                self._deliver()
                continue
            rank = self._random.choice(ready)
            try:
                waiting[rank] = next(running[rank])
            except StopIteration:
                del running[rank]
        assert not any(self._sends.values()), "messages that nobody read"
        return []


def rounds(schedules: Sequence[Schedule]) -> int:
    """How many message times the schedules take one after the other: a rank works on one step at a time, a message
    takes one unit from the moment that its sender gets to it."""
    steps = [[item for item in schedule if not isinstance(item, Finish)] for schedule in schedules]
    clock = [0] * len(steps)
    at = [0] * len(steps)
    started: dict[tuple[int, int], list[int]] = {}
    read: dict[tuple[int, int], int] = {}
    posted: set[tuple[int, int]] = set()
    while any(at[rank] < len(steps[rank]) for rank in range(len(steps))):
        moved = False
        for rank, mine in enumerate(steps):
            if at[rank] == len(mine):
                continue
            item = mine[at[rank]]
            assert isinstance(item, Step)
            if item.to is not None and (rank, at[rank]) not in posted:
                posted.add((rank, at[rank]))
                started.setdefault((rank, item.to), []).append(clock[rank])
                moved = True
            end = clock[rank] + 1
            if item.frm is not None:
                pair = (item.frm, rank)
                if len(started.get(pair, ())) <= read.get(pair, 0):
                    continue
                end = max(end, started[pair][read.get(pair, 0)] + 1)
                read[pair] = read.get(pair, 0) + 1
            clock[rank], at[rank], moved = end, at[rank] + 1, True
        assert moved, "the schedules do not fit together"
    return max(clock)
