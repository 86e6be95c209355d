"""The meetings of a node's ranks for the buckets of a step: one for all that everybody has packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from commlab.errors import DisagreementError, PeerLostError
from commlab.runtime.agreement import Signature
from commlab.runtime.handle import Handle
from commlab.strategies.pushes import _StepPushes
from commlab.window.area import NOWHERE, Place


class Driver:
    """Ends nothing by itself."""

    def poll(self) -> None: ...

    def drive(self, handle: Handle, timeout_s: float | None) -> None:
        assert handle.finished, "nobody would ever end this wait"


class Node:
    """A node whose other ranks are the test: it says what they have packed, and when they arrive."""

    def __init__(self) -> None:
        self.meetings: list[tuple[str, int, Iterator[object], Handle]] = []
        """Of each meeting: its first bucket, how many buckets this rank has said it has, the body and the handle."""
        self.window = SimpleNamespace(sync=SimpleNamespace(places=lambda: self._places))
        self._places: list[Place] = []

    def submit(self, signature: Signature, body: Iterator[object], attached: Callable[[], Any]) -> Handle:
        attachment, handle = attached(), Handle(Driver(), None)
        assert attachment.segment == NOWHERE and signature.name is not None
        self.meetings.append((signature.name, attachment.offset, body, handle))
        return handle

    def arrive(self, *packed: int, error: Exception | None = None) -> None:
        """The other ranks arrive at the last meeting, with so many buckets ``packed``."""
        _, own, body, handle = self.meetings[-1]
        self._places = [Place(NOWHERE, count) for count in (own, *packed)]
        if error is None:
            assert not list(body)
        handle.finish(error)


class Step:
    """A step of ``buckets`` buckets, and what became of its pushes."""

    def __init__(self, buckets: int):
        self.node, self.gate = Node(), Handle(Driver(), None)
        shards = [
            SimpleNamespace(signature=Signature("reduce_scatter", name=f"bucket {index}"), reduce=lambda at=index: at)
            for index in range(buckets)
        ]
        self.sent: list[int] = []
        self.refused: list[tuple[int, Exception]] = []
        self.pushes: Any = _StepPushes(SimpleNamespace(node=self.node, shards=shards), self.gate)  # type: ignore[arg-type]

    def pack(self, index: int, exchange: Callable[[int], object] | None = None) -> None:
        refuse = lambda error, timeout_s: self.refused.append((index, error))  # noqa: E731
        self.pushes.add(SimpleNamespace(exchange=exchange or self.sent.append, refuse=refuse))


def test_one_meeting_for_all_that_everybody_has_packed() -> None:
    step = Step(4)
    for index in range(4):
        step.pack(index)
    assert not step.node.meetings, "nothing leaves before all ranks are known to push"
    step.gate.finish()
    assert [meeting[:2] for meeting in step.node.meetings] == [("bucket 0", 4)]
    step.node.arrive(4, 4)
    assert step.sent == [0, 1, 2, 3] and len(step.node.meetings) == 1
    step.pushes.reduce_all(None)


def test_the_slowest_rank_of_the_node_decides_how_many_buckets_are_reduced() -> None:
    """What is left waits for the next meeting, which this rank begins at once, with all that it has by then."""
    step = Step(5)
    step.gate.finish()
    for index in range(3):
        step.pack(index)
    step.node.arrive(2, 3)
    assert step.sent == [0], "this rank had one bucket when it arrived"
    assert [meeting[:2] for meeting in step.node.meetings] == [("bucket 0", 1), ("bucket 1", 3)]
    step.node.arrive(2, 5)
    assert step.sent == [0, 1] and step.node.meetings[-1][:2] == ("bucket 2", 3)
    step.pack(3)
    step.pack(4)
    step.node.arrive(5, 5)
    assert step.sent == [0, 1, 2] and step.node.meetings[-1][:2] == ("bucket 3", 5)
    step.node.arrive(5, 5)
    assert step.sent == [0, 1, 2, 3, 4] and len(step.node.meetings) == 4
    step.pushes.reduce_all(None)


def test_other_nodes_are_told_of_a_disagreement_in_this_one() -> None:
    """For the first bucket that they wait for in vain; no meeting follows."""
    step = Step(3)
    step.pack(0)
    step.gate.finish()
    step.pack(1)
    step.node.arrive(1)
    error = DisagreementError("rank 1: a barrier")
    step.node.arrive(2, error=error)
    step.pack(2)
    assert len(step.node.meetings) == 2
    with pytest.raises(DisagreementError, match="a barrier"):
        step.pushes.reduce_all(None)
    assert step.sent == [0] and step.refused == [(1, error)]


def test_what_fails_between_the_nodes_is_for_whoever_waits() -> None:
    """Not for the thread that has moved the meeting on; what was sent before stays."""
    step = Step(3)

    def lost(_: int) -> None:
        raise PeerLostError("rank 2 is gone")

    for index in range(3):
        step.pack(index, lost if index == 1 else None)
    step.gate.finish()
    step.node.arrive(3)
    assert step.sent == [0] and len(step.node.meetings) == 1
    for _ in range(2):
        with pytest.raises(PeerLostError, match="rank 2 is gone"):
            step.pushes.reduce_all(None)
