"""Waits for ranks that have left: in the one waiting loop, and in other libraries."""

from __future__ import annotations

import threading
import time

import pytest

from commlab.errors import PeerLostError
from commlab.job.topology import Topology
from commlab.job.watch import Watch
from commlab.runtime import elsewhere
from commlab.runtime.agreement import Signature
from commlab.runtime.elsewhere import waiting_elsewhere
from commlab.runtime.group import Group
from commlab.transport.sim import SimNetwork


def group_of(size: int, rank: int = 0) -> tuple[Group, Watch]:
    group = Group(SimNetwork(size).transports()[rank], Topology((tuple(range(size)),)), timeout_s=60)
    watch = Watch(rank)
    group.observe(watch, range(size))
    return group, watch


def leaves(watch: Watch, rank: int, how: str) -> None:
    """What the watch's thread does when it hears of a rank."""
    watch._gone[rank] = how, time.perf_counter()
    for call in list(watch.calls):
        call()


def test_who_waits_for_a_rank_that_left_is_told() -> None:
    """B1: the awaited rank, by its number in the group, how it left, and the operation."""
    group, watch = group_of(3)
    threading.Timer(0.1, leaves, (watch, 2, "left (exit code 3)")).start()
    with pytest.raises(PeerLostError, match=r"^rank 2 left \(exit code 3\) while rank 0 is in barrier #1$"):
        group.barrier()


def test_a_rank_that_is_not_awaited_may_leave() -> None:
    """B1: no false alarm: rank 1 is slow, and rank 2, whose message has come, is through before it."""
    network = SimNetwork(3)
    transports = network.transports()
    topology = Topology(((0, 1, 2),))
    group = Group(transports[0], topology, timeout_s=60)
    watch = Watch(0)
    group.observe(watch, range(3))
    others = [Group(transport, topology) for transport in transports[1:]]
    handles = [others[1].submit(Signature("barrier")), group.submit(Signature("barrier"))]
    leaves(watch, 2, "left (exit code 0)")

    def late() -> None:
        time.sleep(0.6)
        handles.append(others[0].submit(Signature("barrier")))

    thread = threading.Thread(target=late)
    thread.start()
    handles[1].wait()
    thread.join()


def test_a_library_that_waits_is_made_to_give_up() -> None:
    """B1, under ddp: ``abort`` ends the library's wait, and the error says why."""
    group, watch = group_of(3)
    aborted = threading.Event()

    def library() -> None:
        assert aborted.wait(30)
        raise RuntimeError("gloo: Connection closed by peer")

    with (
        pytest.raises(PeerLostError, match=r"^rank 2 left \(exit code 3\) while rank 0 is in backward: gloo: Conn"),
        waiting_elsewhere(group, "backward", aborted.set),
    ):
        leaves(watch, 2, "left (exit code 3)")
        library()
    assert not watch.calls


def test_a_library_that_does_not_give_up_ends_with_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """B1, under ddp: where ``abort`` does not help, the message is printed and the job ends."""
    group, watch = group_of(3)
    ended: list[int] = []
    done = threading.Event()
    monkeypatch.setattr(elsewhere, "_ENDED_S", 0.05)
    monkeypatch.setattr(elsewhere, "end_job", lambda code: (ended.append(code), done.set()))
    with waiting_elsewhere(group, "backward", lambda: 1 / 0):
        leaves(watch, 1, "left (exit code 0)")
        assert done.wait(30)
    assert ended == [1]
    assert "PeerLostError: rank 1 left (exit code 0) while rank 0 is in backward" in capsys.readouterr().err


def test_other_errors_and_clean_ends_pass() -> None:
    """B1: an error of the user's is not taken for a lost peer, and a wait that ends in time is none."""
    group, watch = group_of(2)
    with pytest.raises(RuntimeError, match="shapes differ"), waiting_elsewhere(group, "forward"):
        raise RuntimeError("shapes differ")
    with waiting_elsewhere(group, "forward"):
        leaves(watch, 1, "left (exit code 0)")
    assert not watch.calls
