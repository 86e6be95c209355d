"""Allreduces of few numbers over links, each in one native call from the announcement to the result."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from closed_form import DTYPES, ops_for, same_bits
from linked import Mesh, late_and_queued, noise, on_all, reduced, right

import commlab
from commlab.collectives.routes import piggyback
from commlab.errors import DisagreementError, PeerLostError, RefusedError, UsageError
from commlab.runtime import at_once as at_once_module
from commlab.runtime.group import Group
from commlab.transport.tcp import LINKS_BYTES, missing_reason

pytestmark = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    mesh = Mesh(getattr(request, "param", 3))
    yield mesh
    mesh.close()


def edges(everything_bytes: int, size: int, dtype: torch.dtype) -> list[int]:
    """Numbers at which the way changes, and between; the most of all for one dtype alone, for the sake of time."""
    everything, most = everything_bytes // dtype.itemsize, max(LINKS_BYTES * size, everything_bytes) // dtype.itemsize
    largest = [most - 1, most] if dtype is torch.float16 else []
    return [1, *(edge for edge in (everything, everything + 1, everything + size + 1) if edge <= most), *largest]


@pytest.mark.parametrize("mesh", [2, 7], indirect=True)
def test_exact_and_counted(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is queued, and what is sent is counted as in the queue."""
    groups, peers = mesh.groups(), mesh.size - 1
    everything_bytes = piggyback.everything_bytes(groups[0].transport, mesh.size)
    monkeypatch.setattr(Group, "_queue", None)
    monkeypatch.setattr(at_once_module, "PATIENCE_US", 20e6)
    for dtype in DTYPES:
        for at, numel in enumerate(edges(everything_bytes, mesh.size, dtype)):
            op = ops_for(dtype)[at % len(ops_for(dtype))]
            before = [(group.bytes_sent, group.messages_sent) for group in groups]
            results = on_all(groups, lambda group, n=numel, d=dtype, o=op: reduced(group, n, d, o))
            assert all(right(each, mesh.size, numel, dtype, op) for each in results), (dtype, numel, op, results)
            all_bytes = numel * dtype.itemsize
            everything = all_bytes <= everything_bytes
            share_bytes = all_bytes if everything else -(-numel // mesh.size) * dtype.itemsize
            messages = peers if everything else 2 * peers
            for group, (sent, told) in zip(groups, before, strict=True):
                assert (group.bytes_sent - sent, group.messages_sent - told) == (messages * share_bytes, messages)


@pytest.mark.parametrize("mesh", [2, 3, 4, 16], indirect=True)
def test_everything_goes_to_everyone_while_the_network_is_fast_enough(mesh: Mesh) -> None:
    """The further bytes of a rank take at most a message's time; never less than on a slow network, nor more than a
    frame has room for. The bits are those of shares."""
    size, transport = mesh.size, mesh.transports[0]

    def most_bytes(byte_s: float) -> int:
        for links in mesh.links:
            links.byte_s = byte_s
        return piggyback.everything_bytes(transport, size)

    slow_bytes, fast_bytes, faster_bytes = most_bytes(40e-9), most_bytes(0.8e-9), most_bytes(1e-12)
    if size == 2:
        assert slow_bytes == fast_bytes == faster_bytes == piggyback.PAIR_BYTES
    else:
        assert slow_bytes == piggyback.EVERYTHING_BYTES and faster_bytes == LINKS_BYTES
        further_bytes = fast_bytes * (size - 1) - 2 * (size - 1) * fast_bytes / size
        assert fast_bytes == piggyback.EVERYTHING_BYTES or further_bytes * 0.8e-9 <= piggyback.MESSAGE_S
    found, groups = [], mesh.groups()
    for byte_s in (40e-9, 1e-12):
        most_bytes(byte_s)
        found += on_all(groups, lambda group: commlab.allreduce(noise(group.rank, 3001, torch.bfloat16), group=group))
        for group in groups:
            group.forget_plans()
    assert all(isinstance(each, torch.Tensor) and same_bits(each, found[0]) for each in found), found


@pytest.mark.parametrize("mesh", [2], indirect=True)
def test_two_ranks_also_in_the_queue(mesh: Mesh) -> None:
    """All that two ranks give each other at once, longer than a frame, and what is too much for that."""
    most, groups = piggyback.PAIR_BYTES // 4, mesh.groups()
    for numel in (LINKS_BYTES, most, most + 1):

        def one(group: Group, n: int = numel) -> torch.Tensor:
            started = [commlab.allreduce_async(noise(group.rank, n, torch.float32), group=group) for _ in range(3)]
            at_once = commlab.allreduce(noise(group.rank, n, torch.float32), group=group)
            assert all(same_bits(each.wait(), at_once) for each in started)
            return at_once

        both = on_all(groups, one)
        wanted = (noise(0, numel, torch.float32).double() + noise(1, numel, torch.float32).double()) / 2
        assert all(torch.equal(each.double(), wanted.float().double()) for each in both), both


def test_wires_and_parameters(mesh: Mesh) -> None:
    """A 16-bit wire is a copy that is put back; a parameter is written, and autograd is told."""
    groups = mesh.groups()

    def one(group: Group) -> tuple[torch.Tensor, int]:
        parameter = torch.nn.Parameter(torch.full((9,), float(group.rank + 1)))
        version = parameter._version
        return commlab.allreduce(parameter, wire="fp16", group=group).detach(), parameter._version - version

    for result in on_all(groups, one):
        assert isinstance(result, tuple), result
        assert result[0].tolist() == [2.0] * 9 and result[1] >= 1


def test_a_late_rank_and_what_is_queued(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for long goes on in the queue; ranks may differ in the way that they take, and order is kept."""
    monkeypatch.setattr(at_once_module, "PATIENCE_US", 1e3)
    groups = mesh.groups()

    for late in range(mesh.size):
        for results in on_all(groups, lambda group, late=late: late_and_queued(group, late, 0.05)):
            assert isinstance(results, list), results
            assert [right(*each) for each in zip(results, [3] * 3, [3000, 5, 200_000], strict=True)] == [True] * 3


@pytest.mark.parametrize("patience_us", [1e5, 0.0])
def test_disagreement(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, patience_us: float) -> None:
    """On all ranks, with both sides, and the group goes on."""
    monkeypatch.setattr(at_once_module, "PATIENCE_US", patience_us)
    groups = mesh.groups()
    for wrong in range(mesh.size):
        for result in on_all(groups, lambda group, wrong=wrong: reduced(group, 7 + (group.rank == wrong))):
            assert isinstance(result, DisagreementError)
            assert "float32[7]" in str(result) and "float32[8]" in str(result)
        assert all(right(each, 3, 11) for each in on_all(groups, lambda group: reduced(group, 11)))


def test_one_rank_refuses(mesh: Mesh) -> None:
    groups = mesh.groups()

    def one(group: Group) -> torch.Tensor:
        tensor = torch.ones(1).expand(4) if group.rank == 1 else torch.ones(4)
        return commlab.allreduce(tensor, group=group)

    for result in on_all(groups, one):
        assert isinstance(result, RefusedError | UsageError) and "share one place in memory" in str(result)
    assert all(right(each, 3, 4) for each in on_all(groups, lambda group: reduced(group, 4)))


def test_a_rank_is_gone(mesh: Mesh) -> None:
    groups = mesh.groups()
    on_all(groups, lambda group: reduced(group, 4))
    mesh.links[2].engine.leave(0.0)
    for result in on_all(groups[:2], lambda group: reduced(group, 4)):
        assert isinstance(result, PeerLostError) and "lost rank 2" in str(result)


def test_another_thread_meanwhile(mesh: Mesh) -> None:
    """While one thread is in the native call, another one's operation is refused by name, on all ranks."""
    groups, errors = mesh.groups(), list[BaseException]()

    def one(group: Group) -> torch.Tensor:
        if group.rank:
            time.sleep(0.1)  # rank 0's two threads are there by now
        return reduced(group, 6)

    def beside() -> None:
        time.sleep(0.03)
        try:
            reduced(groups[0], 6)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=beside)
    thread.start()
    results = on_all(groups, one)
    on_all(groups[1:], lambda group: reduced(group, 6))  # meets the refusal
    thread.join(20)
    assert not thread.is_alive() and all(right(each, 3, 6) for each in results)
    assert len(errors) == 1 and "two threads" in str(errors[0])


def test_without_the_check(mesh: Mesh) -> None:
    """Turned off after the plan was made: the numbers go by messages of their own."""
    groups = mesh.groups()
    assert all(right(each, 3, 8) for each in on_all(groups, lambda group: reduced(group, 8)))
    for group in groups:
        group.agreement.required = False
    assert all(right(each, 3, 8) for each in on_all(groups, lambda group: reduced(group, 8)))
