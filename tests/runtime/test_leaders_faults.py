"""What goes wrong while leaders reduce: a rank that is lost, silent, interrupted or asked meanwhile. Whatever it is, it
is told as without leaders."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from linked import Job, Nodes, on_all, reduced, right

import commlab
from commlab.errors import CommlabError, PeerLostError, PeerTimeoutError
from commlab.runtime.group import Group
from commlab.runtime.leaders import LATE
from commlab.transport.tcp import missing_reason

pytestmark = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())

UNEVEN: Nodes = ((0,), (1, 2), (3, 4, 5))
TWO: Nodes = ((0, 1), (2, 3))
THREE: Nodes = ((0, 1), (2, 3), (4, 5))
FEW, MORE = 4, 200_000
"""Numbers that a page holds, and numbers that the leaders' areas hold, in several frames."""
sizes = pytest.mark.parametrize("numel", [FEW, MORE])


@pytest.fixture
def job() -> Iterator[Job]:
    made = Job(TWO)
    yield made
    made.close()


@pytest.mark.parametrize("gone", range(6))
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("nodes", "numel"), [(UNEVEN, FEW), (THREE, MORE)])
def test_a_leader_or_a_member_is_gone(nodes: Nodes, numel: int, gone: int, begun: bool) -> None:
    """Before the others call, or while they wait: all name it."""
    job = Job(nodes)
    job.require_whole(numel)

    def one(group: Group) -> object:
        if group.rank == gone:
            time.sleep(0.02 * begun)
            job.mesh.links[gone].engine.leave(0.0)
            return None
        time.sleep(0.02 * (not begun))
        return reduced(group, numel)

    start_s = time.perf_counter()
    for rank, result in enumerate(job.all(one)):
        assert rank == gone or (isinstance(result, PeerLostError) and result.rank == gone), (rank, result)
    assert time.perf_counter() - start_s < 15
    job.close()


@sizes
@pytest.mark.parametrize("silent", range(4))
def test_a_silent_rank_is_named(silent: int, numel: int) -> None:
    """Also by those who wait for a rank that waits for it."""
    job, named = Job(TWO), []

    def one(group: Group) -> object:
        if group.rank == silent:
            while len(named) < job.size - 1:
                time.sleep(0.01)
            return None
        group.progress.timeout_s = 2.0
        try:
            return reduced(group, numel)
        finally:
            named.append(group.rank)

    for rank, result in enumerate(job.all(one)):
        if rank != silent:
            assert isinstance(result, PeerTimeoutError) and f"for rank {silent} in allreduce" in str(result), result
    job.close()


@sizes
def test_an_operation_that_is_given_up(job: Job, numel: int) -> None:
    """Kind: Ctrl-C in a member that waits. Its tensor is not touched any more, and its group takes no more work; the
    others have its numbers."""
    tensors = [torch.full((numel,), 1.0 + group.rank) for group in job.groups]
    member = job.groups[1].leaders
    assert member is not None
    way = "call" if numel == FEW else "call_with_shares"
    call = getattr(member, way)

    def interrupted(*arguments: Any) -> object:
        assert call(*arguments[:-1], 1e3) == LATE
        raise KeyboardInterrupt

    setattr(member, way, interrupted)
    with pytest.raises(KeyboardInterrupt):
        commlab.allreduce(tensors[1], "sum", group=job.groups[1])
    for result in on_all([job.groups[rank] for rank in (0, 2, 3)], lambda group: commlab.allreduce(
        tensors[group.rank], "sum", group=group
    )):  # fmt: skip
        assert isinstance(result, torch.Tensor), result
    assert [tensor.unique().tolist() for tensor in tensors] == [[10.0], [2.0], [10.0], [10.0]]
    with pytest.raises(CommlabError, match="KeyboardInterrupt"):
        reduced(job.groups[1], 3)


@pytest.mark.parametrize("gone", [0, 2, 3])
@pytest.mark.parametrize("nodes", [TWO, THREE])
def test_a_rank_is_lost_while_numbers_move(nodes: Nodes, gone: int) -> None:
    """Who has what it needs of the lost rank has a result, and it is right; the others name that rank."""
    for delay_s in (0.0, 0.002, 0.01, 0.05):
        job = Job(nodes, narrow=True)
        ready = threading.Barrier(job.size)
        leaves = threading.Timer(delay_s, job.mesh.links[gone].engine.leave, (0.0,))

        def one(group: Group, job: Job = job, ready: Any = ready, leaves: Any = leaves) -> None:
            ready.wait()
            if group.rank == gone:
                group.progress.timeout_s = 0.3  # it waits in vain, with no connection left
                leaves.start()
            while True:
                assert right(reduced(group, MORE), job.size, MORE), "a wrong sum"

        for rank, result in enumerate(job.all(one)):
            assert rank == gone or (isinstance(result, PeerLostError) and result.rank == gone), (rank, result)
        leaves.join()
        job.close()


@pytest.mark.parametrize("nodes", [TWO, THREE])
def test_a_leader_is_interrupted_while_numbers_move(nodes: Nodes) -> None:
    """Its tensor is not touched any more, its members wait in vain and say so, the others have right sums if any, and
    nothing works on memory that is closed."""
    job = Job(nodes, narrow=True)
    leader = job.groups[0].leaders
    assert leader is not None
    call = leader.call_with_shares

    def interrupted(*arguments: Any) -> object:
        assert call(*arguments[:-1], 2e3) == LATE
        raise KeyboardInterrupt

    leader.call_with_shares = interrupted

    def one(group: Group) -> torch.Tensor:
        group.progress.timeout_s = 1.0
        tensor = torch.full((MORE,), 1.0 + group.rank)
        try:
            return commlab.allreduce(tensor, "sum", group=group)
        except KeyboardInterrupt:
            return tensor

    results = job.all(one)
    assert isinstance(results[0], torch.Tensor) and results[0].unique().tolist() == [1.0]
    # It names its leader, or whom that was the last to wait for.
    assert isinstance(results[1], PeerTimeoutError), results[1]
    total = float(sum(range(1, job.size + 1)))
    for result in results[2:]:
        assert isinstance(result, PeerTimeoutError) or result.unique().tolist() == [total], result
    job.close()


@pytest.mark.parametrize(("numel", "calls"), [(5, 2000), (MORE, 60)])
def test_who_is_awaited_may_be_asked_at_any_time(job: Job, numel: int, calls: int) -> None:
    """By a thread that waits for something else, say, while another one moves the operation on."""
    asked, ended = 0, []

    def one(group: Group | None) -> None:
        nonlocal asked
        if group is not None:
            try:
                assert all(right(reduced(group, numel), job.size, numel) for _ in range(calls))
            finally:
                ended.append(group.rank)
            return
        while len(ended) < job.size:
            asked += sum(len(each.leaders.peers()) <= job.size for each in job.groups if each.leaders is not None)

    assert on_all([*job.groups, None], one) == [None] * (job.size + 1)
    assert asked


@pytest.mark.parametrize("nodes", [UNEVEN, TWO])
def test_nothing_is_left_open(nodes: Nodes) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    Job(nodes).close()
    before = descriptors()
    for _ in range(3):
        Job(nodes).close()
    assert descriptors() <= before
