"""What a loop asks for in every step is carried out without announcements; what one rank does otherwise is found out,
on all ranks, and changes no number."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from forked import RankFailed
from refused import message

import commlab.horovod.torch as hvd
from commlab.horovod import world
from commlab.horovod.announced import Ready
from commlab.horovod.announcement import Announcement
from commlab.horovod.foreseen import Foreseen, pattern_of
from commlab.horovod.submission import Submission
from commlab.horovod.submitted import Submitted

SHAPES = ((3,), (40, 7), (1,), (2, 3, 5), (300_001,))


def contribution(rank: int, step: int, index: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small integers, distinct for each rank, step, tensor and place: their sums are exact."""
    count = torch.Size(SHAPES[index]).numel()
    return ((torch.arange(count) * 7 + 3 * rank + 5 * step + index) % 11).to(dtype).view(SHAPES[index])


def step_of(rank: int, size: int, step: int, indexes: Any, named: bool = True, dtype: Any = torch.float32) -> None:
    """One step: all are started, then all are waited for."""
    handles = [
        (
            index,
            hvd.allreduce_async(
                contribution(rank, step, index, dtype), op=hvd.Sum, name=f"{dtype} {index}" if named else None
            ),
        )
        for index in indexes
    ]
    for index, handle in handles:
        wanted = sum(contribution(peer, step, index, dtype) for peer in range(size))
        assert torch.equal(hvd.synchronize(handle), wanted), (step, index)


def counts() -> tuple[int, int, int]:
    channel = world.require().engine.channels[0]
    return channel.ticks, channel.foreseen, channel.missed


def settled(rank: int, size: int, **options: Any) -> None:
    """Steps until none of them has a tick."""
    for step in range(40):
        before = counts()
        step_of(rank, size, step, range(5), **options)
        if step > 3 and counts()[0] == before[0]:
            return
    raise AssertionError(f"every step has ticks: {counts()}")


def loops(rank: int, size: int) -> None:
    hvd.init()
    for named in (True, False):
        settled(rank, size, named=named)
        before = counts()
        for step in range(40, 60):
            step_of(rank, size, step, range(5), named=named)
        ticks, foreseen, missed = (now - then for now, then in zip(counts(), before, strict=True))
        assert (ticks, missed) == (0, 0) and 20 <= foreseen <= 100, (ticks, foreseen, missed)
    # In another order on every rank, of two dtypes, and what is waited for at once beside them.
    orders = [list(range(5)), [4, 2, 0, 1, 3], [3, 1, 4, 0, 2]]
    for step in range(60, 90):
        step_of(rank, size, step, orders[rank], dtype=torch.float64)
        step_of(rank, size, step, orders[rank])
        assert hvd.allreduce(torch.tensor(float(rank + step)), name="loss", op=hvd.Sum) == sum(
            peer + step for peer in range(size)
        )
        if step == 70:
            assert hvd.broadcast(torch.tensor(rank), root_rank=size - 1, name="other") == size - 1
    hvd.shutdown()


@pytest.mark.parametrize(("size", "nodes"), [(2, ""), (3, ""), (2, "1"), (3, "0-1,2")])
def test_what_comes_again_is_carried_out_without_a_tick(forked: Any, size: int, nodes: str) -> None:
    forked(loops, size, environ={"COMMLAB_NODES": nodes} if nodes else None)


def deviations(rank: int, size: int) -> dict[str, str]:
    """After each deviation of the last rank the steps go on, with the right numbers."""
    hvd.init()
    odd = rank == size - 1
    found = {}

    def another_shape() -> None:
        step_of(rank, size, 1, range(4))
        handle = hvd.allreduce_async(
            torch.ones(7) if odd else contribution(rank, 1, 4), op=hvd.Sum, name="torch.float32 4"
        )
        found["shape"] = message(lambda: hvd.synchronize(handle))

    def a_part() -> None:
        step_of(rank, size, 2, range(4))
        step_of(rank, size, 2, [4])

    def only_some() -> None:
        """The odd one waits for some before it starts the rest, which the others have started before."""
        if odd:
            step_of(rank, size, 3, range(3))
            step_of(rank, size, 3, range(3, 5))
        else:
            step_of(rank, size, 3, range(5))

    def refused() -> None:
        tensor = torch.ones(3).to_sparse() if odd else contribution(rank, 4, 0)
        found["refused"] = message(lambda: hvd.allreduce(tensor, op=hvd.Sum, name="torch.float32 0"))
        step_of(rank, size, 4, range(1, 5))

    def another_first() -> None:
        if odd:
            time.sleep(0.05)
        number = hvd.allreduce_async(torch.tensor(rank), op=hvd.Sum, name="once")
        step_of(rank, size, 5, range(5))
        assert hvd.synchronize(number) == sum(range(size))

    def no_memory() -> None:
        """Where the odd one fails before anything is sent, all fail, and are told why."""
        original = torch._foreach_copy_
        if odd:

            def fails(*_: Any) -> None:
                torch._foreach_copy_ = original
                raise MemoryError("none is left")

            torch._foreach_copy_ = fails
        handles = [
            hvd.allreduce_async(contribution(rank, 6, index), op=hvd.Sum, name=f"torch.float32 {index}")
            for index in range(5)
        ]
        found["memory"] = " | ".join(message(lambda handle=handle: hvd.synchronize(handle)) for handle in handles)

    def process_set() -> None:
        made = hvd.add_process_set(list(range(size)))
        assert made.included()

    for deviate in (another_shape, a_part, only_some, refused, another_first, no_memory, process_set):
        settled(rank, size)
        before = counts()
        deviate()
        for step in range(100, 104):
            step_of(rank, size, step, range(5))
        assert counts()[0] > before[0], deviate.__name__
    hvd.shutdown()
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_does_something_else(forked: Any, size: int) -> None:
    for rank, found in enumerate(forked(deviations, size, limit_s=100)):
        for words in (
            "disagree about 'allreduce.torch.float32 4'",
            "float32[7]",
            "float32[300001]",
            f"rank {size - 1}",
        ):
            assert words in found["shape"], found
        assert "sparse" in found["refused"], found
        texts = found["memory"].split(" | ")
        assert len(texts) == 5 and all("none is left" in text for text in texts), (rank, found)


def joins(rank: int, size: int) -> int:
    """Ranks end after different numbers of steps; those that go on get what is contributed."""
    hvd.init()
    for named in (True, False):
        settled(rank, size, named=named)
    for step in range(3 * (rank + 1)):
        there = [peer for peer in range(size) if step < 3 * (peer + 1)]
        handles = [
            hvd.allreduce_async(contribution(rank, step, index), op=hvd.Sum, name=f"torch.float32 {index}")
            for index in range(5)
        ]
        for index, handle in enumerate(handles):
            assert torch.equal(hvd.synchronize(handle), sum(contribution(peer, step, index) for peer in there)), (
                step,
                index,
            )
    last = hvd.join()
    settled(rank, size, named=False)
    hvd.shutdown()
    return last


def test_join_after_steps_that_were_foreseen(forked: Any) -> None:
    assert forked(joins, 3) == [2, 2, 2]


def parts(rank: int, size: int) -> None:
    """Who neither waits nor submits the rest gets what there is all the same."""
    hvd.init()
    settled(rank, size)
    handle = hvd.allreduce_async(contribution(rank, 9, 1), op=hvd.Sum, name="torch.float32 1")
    stop_s = time.monotonic() + 20
    while not hvd.poll(handle) and time.monotonic() < stop_s:
        time.sleep(0.01)
    assert hvd.poll(handle)
    assert torch.equal(hvd.synchronize(handle), sum(contribution(peer, 9, 1) for peer in range(size)))
    settled(rank, size)
    hvd.shutdown()


def test_the_rest_of_a_batch_is_not_waited_for_for_ever(forked: Any) -> None:
    forked(parts, 2)


def alone(rank: int, size: int) -> None:
    hvd.init()
    settled(rank, size)
    if rank == 0:
        step_of(rank, size, 50, range(5))
    else:
        time.sleep(6)


def test_who_waits_for_a_rank_that_does_not_come_is_told_which(forked: Any) -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 0.*rank(s \[| )1"):
        forked(alone, 2, environ={"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "2"})


def request(name: str, numel: int = 4, **more: Any) -> Announcement:
    return Announcement("allreduce", name, ("float32",), ((numel,),), "sum", **more)


def ready(*names: str, anew: bool = False, numel: int = 4) -> list[Ready]:
    requests = [request(name, numel) for name in names]
    return [Ready(each, {0: each, 1: each}, None, anew and not at) for at, each in enumerate(requests)]


def known(foreseen: Foreseen) -> set[tuple[str, ...]]:
    return {tuple(pattern.name for pattern in batch.patterns) for batch in foreseen.batches.values()}


def test_what_is_learned() -> None:
    foreseen = Foreseen(1000)
    for _ in range(2):
        assert known(foreseen) == set()
        foreseen.learn(ready("a", "b", anew=True), 2)
        foreseen.learn(ready("c"), 2)
        foreseen.learn(ready("loss", anew=True), 2)
    assert known(foreseen) == {("a", "b", "c")}  # what comes after the loss may still travel with it
    foreseen.learn(ready("x", anew=True), 2)
    assert known(foreseen) == {("a", "b", "c"), ("loss",)}
    # In vain: believed again once it has come together four times in a row, then eight times.
    for times in (4, 8):
        assert foreseen.missed(request("b"))
        assert not foreseen.missed(request("b"))
        for _ in range(times):
            assert known(foreseen) == {("loss",)}
            foreseen.learn(ready("a", "b", "c", anew=True), 2)
        foreseen.learn(ready(f"x{times}", anew=True), 2)
        assert known(foreseen) == {("a", "b", "c"), ("loss",)}
    # What comes together otherwise from now on.
    foreseen.learn(ready("a", "b", anew=True), 2)
    foreseen.learn(ready("c", anew=True), 2)
    assert known(foreseen) == {("loss",)}


def test_what_is_too_large_to_travel_together() -> None:
    foreseen = Foreseen(fusion_bytes=40)
    for _ in range(4):
        foreseen.learn(ready("a", "b", "c", "d", "e", anew=True), 2)
    assert known(foreseen) == {("a", "b"), ("c", "d"), ("e",)}
    large = Foreseen(fusion_bytes=1 << 30)
    for _ in range(4):
        large.learn(ready("a", "b", "c", anew=True, numel=1 << 20), 2)
    assert known(large) == {("a", "b"), ("c",)}  # 8 MiB do not wait for more


def test_what_is_never_foreseen() -> None:
    for odd in (
        request("a", absent=True),
        request("a", refused="no"),
        request("a", scales=(0.5, 1.0)),
        request("a")._replace(op="adasum"),
        request("a")._replace(kind="broadcast"),
        request("a")._replace(dtypes=("float32", "float64"), shapes=((1,), (1,))),
    ):
        assert pattern_of(odd) is None
    assert pattern_of(request("x.noname.3", named=False)) == pattern_of(request("x.noname.4", named=False))
    foreseen = Foreseen(1000)
    differ = [Ready(request("a"), {0: request("a"), 1: request("a", 5)}, None, True)]
    lacking = [Ready(request("b"), {0: request("b")}, None, True)]
    for _ in range(5):
        foreseen.learn([*differ, *lacking], 2)
    assert known(foreseen) == set()


def test_which_batches_are_complete() -> None:
    foreseen = Foreseen(1000)
    for _ in range(3):
        foreseen.learn(ready("a", "b", anew=True), 2)
        foreseen.learn(ready("n", anew=True), 2)
    submitted = Submitted()
    first = Submission(request("b"))
    assert submitted.put(first)  # nothing is foreseen
    submitted.foresee(foreseen.batches)
    assert submitted.incomplete and not submitted.complete
    second, other = Submission(request("a")), Submission(request("z"))
    assert submitted.put(other) and not submitted.incomplete
    assert submitted.put(second) and submitted.complete
    promise = submitted.take_batch()
    assert promise is not None and promise.submissions == [second, first]
    assert len(submitted) == 1 and submitted.take_batch() is None and not submitted.incomplete
    submitted.put_back(promise.submissions)
    assert submitted.complete and not any(each.taken for each in promise.submissions)
    assert submitted.take_all() == [second, first, other] and not submitted.complete
    # The same request twice, as operations without a name have it: one batch after the other.
    twice = [Submission(request("n")), Submission(request("n"))]
    assert [submitted.put(each) for each in twice] == [True, True]
    for each in twice:
        promise = submitted.take_batch()
        assert promise is not None and promise.submissions == [each]
    assert not len(submitted)
