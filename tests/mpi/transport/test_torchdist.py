"""Transport ``torch`` (gloo) under mpirun: the same results as over MPI, and groups of groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from closed_form import divided_first, expected, hop_tolerance, numbers
from mpi_ranks import TIMEOUT_S, Ranks

import commlab
from commlab.job.launch import detect
from commlab.job.topology import Topology
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group
from commlab.schedules import ALGORITHMS
from commlab.transport.rendezvous import store_for
from commlab.transport.torchdist import TorchTransport


@pytest.fixture(scope="module")
def gloo() -> Iterator[Group]:
    """All ranks over gloo, meeting over MPI."""
    launch = detect()
    transport = TorchTransport(store_for(launch, TIMEOUT_S), launch.rank, launch.size, TIMEOUT_S)
    group = Group(transport, Topology((tuple(range(launch.size)),)), TIMEOUT_S)
    yield group
    group.close()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_allreduce(ranks: Ranks, gloo: Group, algorithm: str) -> None:
    for dtype, op in ((torch.float32, "mean"), (torch.bfloat16, "mean"), (torch.int64, "prod"), (torch.float64, "max")):
        numels = (0, 1, 5, 1000, 100_003)
        data = [numbers(gloo.rank, numel, dtype, op) for numel in numels]
        handles = [commlab.allreduce_async(each, op, algorithm=algorithm, group=gloo) for each in data]
        tolerance = hop_tolerance(gloo.size, dtype) if divided_first(op, dtype, algorithm) else 0
        for numel, handle in zip(numels, handles, strict=True):
            want = expected(op, gloo.size, numel, dtype)
            assert ((handle.wait().double() - want.double()).abs() <= tolerance).all(), (dtype, numel)


def test_roots_and_records(ranks: Ranks, gloo: Group) -> None:
    for root in {0, gloo.size - 1}:
        everywhere = numbers(gloo.rank, 200_000, torch.float32)
        assert torch.equal(commlab.broadcast(everywhere, root, group=gloo), numbers(root, 200_000, torch.float32))
        mine = numbers(gloo.rank, 65, torch.float32)
        commlab.reduce(mine, root, "sum", group=gloo)
        if gloo.rank == root:
            assert torch.equal(mine, expected("sum", gloo.size, 65, torch.float32))
    assert gather_bytes(gloo, b"x" * gloo.rank, "texts") == [b"x" * rank for rank in range(gloo.size)]


@pytest.mark.mpi(min_size=2)
def test_disagreement(ranks: Ranks, gloo: Group) -> None:
    with pytest.raises(commlab.DisagreementError, match=r"rank 0: allreduce #\d+ of float32\[7\]"):
        commlab.allreduce(torch.zeros(8 if gloo.rank else 7), group=gloo)
    gloo.barrier()


def test_groups_beside_the_whole(ranks: Ranks, gloo: Group) -> None:
    """Two groups cut from one transport, both and the whole under way at once."""
    cut = max(1, gloo.size // 3)
    parts = [part for part in (range(cut), range(cut, gloo.size)) if part]
    group = next(made for made in [gloo.subgroup(part) for part in parts] if made is not None)
    try:
        whole = commlab.allreduce_async(numbers(gloo.rank, 1000, torch.float32), "sum", algorithm="tree", group=gloo)
        own = commlab.allreduce_async(numbers(group.rank, 1000, torch.int32), "sum", algorithm="direct", group=group)
        assert torch.equal(own.wait(), expected("sum", group.size, 1000, torch.int32))
        assert torch.equal(whole.wait(), expected("sum", gloo.size, 1000, torch.float32))
    finally:
        group.close()


@pytest.mark.mpi(min_size=2)
def test_a_silent_peer_is_named(ranks: Ranks, gloo: Group) -> None:
    """Nothing is lost by a timeout: the operation goes on when the peer comes."""
    values = numbers(gloo.rank, 10, torch.float32)
    if gloo.rank == 0:
        handle = commlab.allreduce_async(values, "sum", group=gloo)
        with pytest.raises(
            commlab.PeerTimeoutError, match=r"rank 0 has waited \d+\.\d s for ranks? 1.* in allreduce #\d+ of"
        ):
            handle.wait(timeout_s=0.05)
        ranks.meet()
        handle.wait()
    else:
        ranks.meet()
        commlab.allreduce(values, "sum", group=gloo)
    assert torch.equal(values, expected("sum", gloo.size, 10, torch.float32))
