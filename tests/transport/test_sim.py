"""The simulated network is strict: what a careless schedule or executor does shows there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from closed_form import expected, numbers
from simulated import simulate

from commlab.chunks import EMPTY, Range
from commlab.runtime.execute import Execution
from commlab.runtime.operand import Operand
from commlab.schedules import ALGORITHMS, compose
from commlab.schedules.step import Schedule, Step
from commlab.transport.base import Pending
from commlab.transport.sim import SimNetwork


def run_ring(execution: type[Execution], size: int = 4) -> list[torch.Tensor]:
    data = [numbers(rank, 400, torch.float32) for rank in range(size)]
    operands = [Operand(each, "sum", size) for each in data]
    # Two segments per chunk, fewer than are in flight: so it matters who waits for what.
    simulate(
        lambda rank: compose.allreduce(ALGORITHMS["ring"], rank, size, 400),
        operands,
        200,
        SimNetwork(size),
        execution,
    )
    return data


class NeverWaitsBeforeItWrites(Execution):
    def _await_sends(self, part: Range) -> Pending:
        return iter(())  # type: ignore[return-value]


class NeverWaitsBeforeItReads(Execution):
    def _complete_receives(self, part: Range) -> Pending:
        return iter(())  # type: ignore[return-value]


class FinishesAtOnce(Execution):
    def _finish(self, chunk: Range) -> Pending:
        self.operand.finish(chunk)
        return iter(())  # type: ignore[return-value]


class LeavesBeforeItsSendsAreRead(Execution):
    def _await_send(self) -> Pending:
        self._sends.popleft()
        return iter(())  # type: ignore[return-value]


@pytest.mark.parametrize("mutant", [NeverWaitsBeforeItReads, FinishesAtOnce])
def test_sim_shows_what_a_careless_executor_does(mutant: type[Execution]) -> None:
    want = expected("mean", 4, 400, torch.float32)
    assert all(torch.equal(got, want) for got in run_ring(Execution))
    assert not all(torch.equal(got, want) for got in run_ring(mutant))


def overwrite(rank: int) -> Schedule:
    """Rank 0 sends its buffer to the late rank 1, and then gets rank 2's in its place."""
    everything = Range(0, 8)
    if rank == 0:
        yield Step(1, everything, None, EMPTY)
        yield Step(None, EMPTY, 2, everything)
    elif rank == 1:
        yield Step(None, EMPTY, 2, Range(8, 16))
        yield Step(None, EMPTY, 0, Range(8, 16))
    else:
        yield Step(0, everything, None, EMPTY)
        yield Step(1, everything, None, EMPTY)


def test_sim_shows_an_early_overwrite() -> None:
    for execution, harmed in ((Execution, False), (NeverWaitsBeforeItWrites, True)):
        data = [numbers(rank, 16, torch.float32) for rank in range(3)]
        simulate(overwrite, data, execution=execution)
        assert torch.equal(data[0][:8], numbers(2, 8, torch.float32))
        assert torch.equal(data[1][8:], numbers(0, 8, torch.float32)) is not harmed


def test_sim_shows_a_deadlock() -> None:
    """Everyone wants its neighbour's number before it hands on its own copy of it."""

    def circle(rank: int) -> Iterator[Step]:
        yield Step(None, EMPTY, (rank - 1) % 3, Range(0, 4))
        yield Step((rank + 1) % 3, Range(0, 4), None, EMPTY)

    with pytest.raises(
        RuntimeError, match=r"deadlock: rank 0 waits for \[2\], rank 1 waits for \[0\], rank 2 waits for \[1\]"
    ):
        simulate(circle, [torch.zeros(4) for _ in range(3)])


def test_sim_shows_a_message_that_nobody_reads() -> None:
    def too_much(rank: int) -> Iterator[Step]:
        if rank == 0:
            yield Step(1, Range(0, 4), None, EMPTY)

    with pytest.raises(RuntimeError, match=r"nobody read: 0 -> 1: 1"):
        simulate(too_much, [torch.zeros(4)] * 2, execution=LeavesBeforeItsSendsAreRead)
    with pytest.raises(RuntimeError, match=r"deadlock: rank 0 waits for \[1\]"):
        simulate(too_much, [torch.zeros(4)] * 2)


def test_sim_shows_a_message_of_another_size() -> None:
    def uneven(rank: int) -> Iterator[Step]:
        yield Step(1, Range(0, 4), None, EMPTY) if rank == 0 else Step(None, EMPTY, 0, Range(0, 3))

    with pytest.raises(RuntimeError, match="rank 0 sends 16 B, rank 1 expects 12 B"):
        simulate(uneven, [torch.zeros(4)] * 2)
