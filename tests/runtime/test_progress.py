"""Handles and the queue that moves them on: order, errors, silence, and the thread that helps where a core is free."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from commlab.collectives.allreduce import allreduce, allreduce_async
from commlab.collectives.operations import broadcast, reduce, reduce_scatter
from commlab.errors import PeerLostError, PeerTimeoutError, UsageError
from commlab.job.topology import Topology
from commlab.runtime import waiting
from commlab.runtime.agreement import Signature
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group
from commlab.runtime.handle import Handle, Operation
from commlab.runtime.progress import Progress
from commlab.transport.sim import SimNetwork


class Message:
    """A request that arrives when told to."""

    def __init__(self, *peers: int):
        self.arrived, self._peers = False, peers

    def test(self) -> bool:
        return self.arrived

    def peers(self) -> Sequence[int]:
        return self._peers


def waiting_for(*messages: Message) -> Iterator[Message]:
    for message in messages:
        while not message.test():
            yield message


def operation(progress: Progress, body: Iterator[Message], result: object = None, sequence: int = 1) -> Operation:
    """An operation that has not been submitted yet."""
    handle = Handle(progress, lambda: Signature("allreduce", name="w").text(sequence), result)
    return Operation(body, handle, progress.rank)  # type: ignore[arg-type]


def inline(timeout_s: float = 5.0) -> Progress:
    return Progress(2, timeout_s, threaded=False)


def lost(rank: int | None, text: str) -> PeerLostError:
    error = PeerLostError(text)
    error.rank = rank
    return error


@pytest.mark.parametrize(
    "how, sentence",
    [
        (
            "is gone (killed by signal 9, SIGKILL)",
            "rank 2: rank 3 is gone (killed by signal 9, SIGKILL), in {}: no link",
        ),
        ("left (exit code 3)", "rank 3 left (exit code 3) while rank 2 is in {}: no link"),
        ("", "rank 2: no link, in {}"),
    ],
)
def test_the_watch_is_asked_about_the_rank_that_is_lost(how: str, sentence: str) -> None:
    """Kind: a transport that knows who is lost; the request has ended, and waits for nobody any more."""
    asked: list[int] = []

    def departed(rank: int) -> str:
        asked.append(rank)
        return how

    handle = Handle(inline(), lambda: "allreduce #1")
    named = Operation(iter(()), handle, 2, departed).lost(lost(3, "no link"))
    assert str(named) == sentence.format("allreduce #1")
    assert named.rank == 3 and set(asked) == {3}
    asked.clear()
    assert (
        str(Operation(iter(()), handle, 2, departed).lost(lost(None, "no link"))) == "rank 2: no link, in allreduce #1"
    )
    assert not asked


def test_operations_run_one_after_the_other() -> None:
    progress, order, message = inline(), [], Message(1)

    def body(index: int) -> Iterator[Message]:
        order.append(f"begin {index}")
        yield from waiting_for(message)
        order.append(f"end {index}")

    first, second = (progress.submit(operation(progress, body(index), index)) for index in (1, 2))
    assert order == ["begin 1"], "started at once, and the second not before the first has ended"
    assert not first.done()
    assert not second.done()
    message.arrived = True
    assert second.wait() == 2
    assert first.done()
    assert first.wait() == 1
    assert order == ["begin 1", "end 1", "begin 2", "end 2"]


@pytest.mark.parametrize("awaited", [False, True])
def test_who_waits_elsewhere_moves_on_what_has_not_ended_at_once(awaited: bool) -> None:
    """What ends in its first step is not registered; what does not is, until it has ended, whoever ends it."""
    progress, message = inline(), Message(1)
    assert progress.submit(operation(progress, iter(())), awaited).finished
    assert id(progress) not in waiting.under_way
    handle = progress.submit(operation(progress, waiting_for(message)), awaited)
    assert waiting.under_way[id(progress)]() is progress and not handle.finished
    assert progress.submit(operation(progress, iter(())), awaited) is not handle
    message.arrived = True
    waiting.move_others(object())
    assert handle.finished and id(progress) not in waiting.under_way
    progress.close()


def test_others_begin_while_all_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another thread, which may get its turn between two entries, where garbage is collected: no wait breaks off of
    that."""
    progress, message, late = inline(), Message(), inline()

    class Shared(dict[int, Any]):
        def items(self) -> Any:
            for entry in super().items():
                waiting.begin_moving(late)
                yield entry

    monkeypatch.setattr(waiting, "under_way", Shared())
    handle = progress.submit(operation(progress, waiting_for(message)))
    message.arrived = True
    waiting.move_others(object())
    assert handle.finished


def test_an_operation_ends_while_another_is_called() -> None:
    """The first one in a thread that moves this queue on, between two glances of the caller at the queue."""
    progress, message = inline(), Message()
    for sequence in (1, 2):
        progress.submit(operation(progress, waiting_for(message), sequence=sequence))
    assert not progress.all_begun()

    class Begun(Operation):
        """Looked at, it ends."""

        __slots__ = ()

        @property
        def begun(self) -> bool:  # type: ignore[override]
            message.arrived = True
            progress.poll()
            return True

        @begun.setter
        def begun(self, value: bool) -> None:
            pass

    for queued in progress._queue:
        queued.__class__ = Begun
    assert progress.all_begun()
    assert progress.head() is None and progress.all_begun()


def test_an_error_belongs_to_its_own_operation() -> None:
    progress = inline()

    def body() -> Iterator[Message]:
        raise ValueError("mine")
        yield

    broken = progress.submit(operation(progress, body()))
    sound = progress.submit(operation(progress, waiting_for(), "fine"))
    assert sound.wait() == "fine"
    assert broken.done()
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"):
            broken.wait()


def test_an_interrupt_is_not_taken_for_the_end() -> None:
    progress, interrupted = inline(), [True]

    class Interrupts(Message):
        def test(self) -> bool:
            if interrupted.pop():
                raise KeyboardInterrupt
            return True

    interrupts = operation(progress, waiting_for(Interrupts(1)), "result")
    with pytest.raises(KeyboardInterrupt):
        progress.submit(interrupts)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            interrupts.handle.wait()
    assert progress.submit(operation(progress, waiting_for(), "next")).wait() == "next"


def test_who_asked_is_called_back_once() -> None:
    """Before the end and after it, and also when the operation has failed."""
    progress, message, called = inline(), Message(1), []
    handle = progress.submit(operation(progress, waiting_for(message), "result"))
    handle.when_finished(lambda ended: called.append((ended.finished, ended.result)))
    assert not called
    message.arrived = True
    handle.wait()
    handle.when_finished(lambda ended: called.append("late"))
    assert called == [(True, "result"), "late"]

    def fails() -> Iterator[Message]:
        raise ValueError("mine")
        yield

    failed = progress.submit(operation(progress, fails()))
    failed.when_finished(lambda ended: called.append(str(ended.error)))
    assert called[2:] == ["mine"]


class Clock:
    """Stands in for the module ``time`` as seen by the queue: five minutes pass in a moment."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        self.now_s += 1e-4
        return self.now_s

    def sleep(self, pause_s: float) -> None:
        self.now_s += max(pause_s, 0.05)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


def test_a_silent_peer_is_named_in_warnings_and_then_in_an_error(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    progress = inline(timeout_s=35)
    handle = progress.submit(operation(progress, waiting_for(Message(1, 3)), sequence=7))
    with (
        caplog.at_level(logging.WARNING, "commlab"),
        pytest.raises(
            PeerTimeoutError, match=r"rank 2 has waited 35\.\d s for ranks 1, 3 in allreduce #7 'w'.*raise the timeout"
        ),
    ):
        handle.wait()
    words = r"rank 2 has waited {}0\.\d s for ranks 1, 3 in allreduce #7 'w'"
    for message, tens in zip(caplog.messages, (1, 2, 3), strict=True):
        assert re.fullmatch(words.format(tens), message)
    started_s = clock.now_s
    with pytest.raises(PeerTimeoutError, match=r"rank 2 has waited 2\.\d s"):
        handle.wait(timeout_s=2)
    assert clock.now_s - started_s < 3


def test_peers_that_move_are_not_silent(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """The clock of the timeout starts anew with every message, even when operations share one request."""
    progress = inline(timeout_s=35)

    class Shared(Message):
        due_s = 0.0

        def test(self) -> bool:
            return clock.now_s >= self.due_s

    shared = Shared(1)

    def body() -> Iterator[Message]:
        shared.due_s = clock.now_s + 9
        yield from waiting_for(shared)

    handles = [progress.submit(operation(progress, body(), at)) for at in range(6)]
    assert handles[-1].wait() == 5
    assert clock.now_s > 35, "all together they took longer than one may be silent"
    assert not caplog.messages, "nobody was silent for 10 s"


def test_a_thread_moves_operations_on_while_nobody_waits() -> None:
    progress = Progress(0, 5.0, threaded=True)
    try:
        for _ in range(20):
            message = Message(1)
            handles = [progress.submit(operation(progress, waiting_for(message), at)) for at in range(3)]
            message.arrived = True
            until_s = time.perf_counter() + 5
            while not all(handle.finished for handle in handles) and time.perf_counter() < until_s:
                time.sleep(0.0005)
            assert [handle.result for handle in handles if handle.finished] == [0, 1, 2]
    finally:
        progress.close()
    assert not progress._thread.is_alive()  # type: ignore[union-attr]


def test_the_thread_and_the_caller_do_not_disturb_each_other() -> None:
    """Submit, poll and wait as fast as can be while the thread does the same: every operation runs once, in order."""
    progress, order = Progress(0, 5.0, threaded=True), []
    switch_interval_s = sys.getswitchinterval()

    def body(index: int) -> Iterator[Message]:
        message = Message(1)
        yield message
        order.append(index)

    try:
        sys.setswitchinterval(1e-6)
        for at in range(3000):
            handle = progress.submit(operation(progress, body(at), at))
            if at % 3 == 0:
                progress.poll()
            elif at % 7 == 0:
                assert handle.wait() == at
        assert handle.wait() == 2999
        assert progress._thread is not None
        assert progress._thread.is_alive()
    finally:
        sys.setswitchinterval(switch_interval_s)
        progress.close()
    assert order == list(range(3000))


@pytest.fixture
def alone() -> Group:
    return Group(SimNetwork(1).transports()[0], Topology(((0,),)), timeout_s=5.0)


def test_a_group_of_one_changes_nothing(alone: Group) -> None:
    values = torch.tensor([[1.5, -2.0], [3.0, 4.0]])
    for op in ("sum", "mean", "min", "max", "prod"):
        assert torch.equal(allreduce(values.clone(), op, group=alone), values)
        assert torch.equal(reduce_scatter(torch.empty(4), values, op, group=alone), values.view(-1))
        assert torch.equal(reduce(values.clone(), 0, op, group=alone), values)
    assert torch.equal(broadcast(values.clone(), group=alone), values)
    assert gather_bytes(alone, b"one", "this") == [b"one"]
    alone.barrier()
    assert repr(alone) == "<Group rank 0 of 1, 1 node(s), transport sim>"


def test_what_no_rank_can_do_is_refused_at_once(alone: Group) -> None:
    whole, numbers = torch.zeros(3, dtype=torch.int32), torch.zeros(3)
    for call, words in (
        (lambda: allreduce(whole, "mean", group=alone), r"rank 0: allreduce of int32\[3\]: the mean of integers"),
        (lambda: allreduce(numbers.bool(), "sum", group=alone), r"of bool\[3\]: dtypes are float32, .*cast it"),
        (lambda: allreduce(numbers, "avg", group=alone), "unknown op 'avg'; there are sum, mean, min, max, prod"),
        (lambda: allreduce(numbers, wire="fp8", group=alone), "unknown wire 'fp8'; there are None, fp16, bf16"),
        (lambda: allreduce(numbers, "max", wire="fp16", group=alone), "16-bit wire is for sum and mean"),
        (lambda: allreduce(whole, "sum", wire="bf16", group=alone), "16-bit wire is for sum and mean"),
        (lambda: allreduce(numbers, algorithm="rnig", group=alone), "unknown algorithm 'rnig'"),
        (lambda: broadcast(numbers, root=1, group=alone), r"rank 0: broadcast with root 1; the group has ranks 0\.\.0"),
        (lambda: reduce(numbers, root=-1, group=alone), "reduce with root -1"),
        (lambda: reduce_scatter(torch.zeros(2), numbers, group=alone), r"cuts 3 numbers .* into \[3\] .*part has 2"),
        (lambda: reduce_scatter(whole, numbers, group=alone), r"part has 3 numbers of torch\.int32"),
        (lambda: alone.subgroup([0, 0]), r"\[0, 0\] is not a set of ranks of a group of 1"),
        (lambda: alone.subgroup([1]), r"\[1\] is not a set"),
    ):
        with pytest.raises(UsageError, match=words):
            call()


def test_a_closed_group_refuses(alone: Group) -> None:
    alone.close()
    alone.close()
    with pytest.raises(UsageError, match="allreduce on a group that was shut down"):
        allreduce_async(torch.zeros(2), group=alone)
