"""Messages between two ranks, in the group of all ranks, in groups of it, and over links."""

from __future__ import annotations

import pytest
import torch
from closed_form import numbers
from mpi_ranks import Ranks

import commlab
from commlab.errors import DisagreementError, PeerTimeoutError, RefusedError, UsageError
from commlab.job.topology import declared
from commlab.runtime.group import Group
from commlab.runtime.links import open_links
from commlab.transport.mpi import MpiTransport
from commlab.transport.tcp import missing_reason

pytestmark = pytest.mark.mpi(min_size=2)
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


def numbered(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Other numbers on each rank and at each index."""
    return ((torch.arange(numel) * 7 + rank * 13) % 100).to(torch.float32).to(dtype)


def around(group: Group) -> None:
    """Every rank sends to the next one, with collectives under way."""
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for dtype in DTYPES:
        for numel in (0, 1, 1001, 70_001):
            sums = numbers(group.rank, 301, torch.int64, "sum")
            handle = commlab.allreduce_async(sums, "sum", group=group)
            sent = commlab.send_async(numbered(group.rank, numel, dtype), right, group=group)
            room = torch.zeros(numel, dtype=torch.float32).to(dtype)
            assert commlab.recv(room, left, group=group) is room
            assert torch.equal(room.view(torch.uint8), numbered(left, numel, dtype).view(torch.uint8)), (dtype, numel)
            sent.wait()
            handle.wait()
    # Any layout, on both sides.
    sent = commlab.send_async(numbered(group.rank, 60, torch.float32).view(10, 6).t(), right, "t", group)
    room = torch.zeros(12, 10)[::2]
    commlab.recv(room, left, "t", group)
    assert torch.equal(room, numbered(left, 60, torch.float32).view(10, 6).t())
    sent.wait()


def test_around_a_ring(ranks: Ranks) -> None:
    around(ranks.world)
    part = ranks.halves(3)
    if part.size > 1:
        around(part)


@pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())
def test_over_links() -> None:
    launched = MpiTransport()
    nodes = declared("1", launched.size)
    transport, _ = open_links(Group(launched, nodes, 60.0), "tcp", None, True)
    group = Group(transport, nodes, 60.0, cores=1)
    around(group)
    group.barrier()
    group.close()


def test_order_and_disagreement(ranks: Ranks) -> None:
    """Kind: messages of a pair keep their order, and what does not fit is named on the receiver and dropped."""
    group = ranks.world
    if group.rank == 0:
        sends = [commlab.send_async(numbered(at, 50 + at, torch.float32), 1, group=group) for at in range(4)]
        for handle in sends:
            handle.wait()
    if group.rank == 1:
        for at in (0, 1):
            assert torch.equal(commlab.recv(torch.zeros(50 + at), 0, group=group), numbered(at, 50 + at, torch.float32))
        with pytest.raises(DisagreementError, match=r"rank 1 receives float64, 52 el.*rank 0.*float32, 52 el"):
            commlab.recv(torch.zeros(52, dtype=torch.float64), 0, group=group)
        with pytest.raises(DisagreementError, match=r"receives float32, 53 elements, 'w' from rank 0.*float32, 53 el"):
            commlab.recv(torch.zeros(53), 0, "w", group)
    for call in (
        lambda: commlab.send(torch.ones(3), group.size, group=group),
        lambda: commlab.recv(torch.ones(3), group.rank, group=group),
    ):
        with pytest.raises(UsageError, match=rf"rank {group.rank}: (send|recv) of float32\[3\]"):
            call()
    group.barrier()


@pytest.mark.filterwarnings("ignore")
def test_what_one_side_can_not(ranks: Ranks) -> None:
    """B18: the receiver is told why the sender could not send; a sender whose receiver can't receive goes on; and the
    next message fits."""
    for group in (ranks.world, ranks.halves(ranks.size // 2)):
        rank, right, left = group.rank, (group.rank + 1) % group.size, (group.rank - 1) % group.size
        if group.size == 1:
            continue
        bad_sends = (
            (lambda: torch.ones(3).to_sparse(), None, "a sparse_coo tensor"),
            (lambda: torch.ones(3, device="meta"), None, "device meta"),
            (lambda: torch.ones(3), 5, "name must be text"),
            (lambda: None, None, "that is no tensor"),
        )
        for make, name, words in bad_sends:
            with pytest.raises(UsageError, match=rf"rank {rank}: send of .*{words}"):
                commlab.send_async(make(), right, name, group)  # type: ignore[arg-type]
            with pytest.raises(RefusedError, match=rf"rank {rank}: recv of .*rank {left} could not send.*{words}"):
                commlab.recv(torch.ones(3), left, group=group)
        for make in (lambda: torch.ones(1).expand(9001), lambda: torch.ones(9001, device="meta"), lambda: None):
            sent = commlab.send_async(numbered(rank, 9001, torch.float32), right, group=group)
            with pytest.raises(UsageError, match=rf"rank {rank}: recv of"):
                commlab.recv(make(), left, group=group)  # type: ignore[arg-type]
            after = commlab.send_async(numbered(rank, 7, torch.float32), right, group=group)
            assert torch.equal(commlab.recv(torch.zeros(7), left, group=group), numbered(left, 7, torch.float32))
            sent.wait()
            after.wait()
        given = torch.quantize_per_tensor(numbered(rank, 8, torch.float32), 0.5, 3, torch.quint8)
        sent = commlab.send_async(given, right, group=group)
        found = commlab.recv(torch.quantize_per_tensor(torch.zeros(8), 0.5, 3, torch.quint8), left, group=group)
        assert torch.equal(
            found.int_repr(),
            torch.quantize_per_tensor(numbered(left, 8, torch.float32), 0.5, 3, torch.quint8).int_repr(),
        )
        sent.wait()


def test_nobody_sends() -> None:
    """Kind: nothing waits for ever, and the error names the peer and the operation."""
    transport = MpiTransport()
    group = Group(transport, declared("1", transport.size), timeout_s=0.5)
    with pytest.raises(PeerTimeoutError, match=r"for rank \d+ in recv of float32\[3\] from rank"):
        commlab.recv(torch.zeros(3), (group.rank + 1) % group.size, group=group)
