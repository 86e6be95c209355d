"""Links between ranks of an MPI job that are declared to be several nodes: connected over the launcher's channel, and
used by everything that a group does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closed_form import DTYPES, expected, numbers, ops_for, same_bits

import commlab
from commlab.chunks import split
from commlab.collectives.plan import pick
from commlab.errors import CommlabError, DisagreementError, RefusedError, UsageError
from commlab.job.topology import declared
from commlab.runtime.control import exchange_records, gather_bytes
from commlab.runtime.group import Group
from commlab.runtime.links import open_links
from commlab.runtime.nodes import open_nodes
from commlab.transport.mpi import MpiTransport
from commlab.transport.tcp import missing_reason

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())]


MOVED_DTYPES = (torch.bool, torch.uint8, torch.int16, torch.float8_e4m3fn, torch.bfloat16, torch.complex128)


def bytes_like(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Other numbers on each rank and at each index, that every dtype has."""
    return ((torch.arange(numel) * 5 + rank * 3) % 7).float().to(dtype)


def linked(per_node: int | str, links: str = "tcp", iface: str | None = None) -> Group:
    launched = MpiTransport()
    nodes = declared(str(per_node), launched.size)
    transport, reason = open_links(Group(launched, nodes, 60.0), links, iface, True)
    group = Group(transport, nodes, 60.0, cores=1)
    group.links_reason = reason
    return group


def test_everything_over_links() -> None:
    """Kind: every collective, dtype, op, wire and record on links, in a group and in a group of it."""
    group = linked(1)
    assert group.transport.name == "tcp"
    assert group.progress_mode == "the links' native thread"
    odd = group.subgroup(range(1, group.size))
    for each in filter(None, (group, odd)):
        for dtype in DTYPES:
            for op in ops_for(dtype):
                for numel in (1, 3000, 40_001):
                    tensor = numbers(each.rank, numel, dtype, op)
                    commlab.allreduce(tensor, op, algorithm="direct", group=each)
                    assert torch.equal(tensor, expected(op, each.size, numel, dtype)), (dtype, op, numel)
        wired = numbers(each.rank, 70_001, torch.float16).float()
        commlab.allreduce(wired, "sum", wire="fp16", group=each)
        assert torch.equal(wired, expected("sum", each.size, 70_001, torch.float16).float())
        assert exchange_records(each, bytes([each.rank]) * 70, "ranks") == [bytes([r]) * 70 for r in range(each.size)]
        assert gather_bytes(each, b"x" * each.rank, "lengths") == [b"x" * rank for rank in range(each.size)]
        for dtype in MOVED_DTYPES:
            for numel in (1, 77, 70_001):
                last = each.size - 1
                whole = bytes_like(each.rank, numel, dtype)
                commlab.broadcast(whole, last, group=each)
                assert torch.equal(whole.view(torch.uint8), bytes_like(last, numel, dtype).view(torch.uint8)), (
                    dtype,
                    numel,
                )
                room, own = bytes_like(0, numel, dtype).zero_(), split(numel, each.size)[each.rank]
                commlab.allgather(room, bytes_like(0, numel, dtype)[own.start : own.stop].clone(), group=each)
                assert torch.equal(room.view(torch.uint8), bytes_like(0, numel, dtype).view(torch.uint8)), (
                    dtype,
                    numel,
                )
    if group.size > 1:
        with pytest.raises(DisagreementError, match=r"rank 0: allreduce #\d+ of float32\[5\]"):
            commlab.allreduce(torch.ones(5 + group.rank), group=group)
    if odd is not None:
        odd.close()
    group.barrier()
    group.close()


def test_other_operations_and_refusals() -> None:
    """Kind: ranks that call different operations, whether the engine or Python moves them, and an argument that one
    rank refuses: told on every rank, none waits, and the group goes on."""
    group = linked(1)
    if group.size > 1:
        with pytest.raises(DisagreementError, match=r"allreduce #\d+ of float32\[3\].*barrier|barrier.*allreduce"):
            commlab.allreduce(torch.ones(3), group=group) if group.rank else group.barrier()
        with pytest.raises(RefusedError, match=r"rank 1.*sparse") if group.rank != 1 else pytest.raises(CommlabError):
            commlab.allreduce(torch.ones(3).to_sparse() if group.rank == 1 else torch.ones(3), group=group)
        with pytest.raises(CommlabError):
            group.subgroup([0, group.size + group.rank])
        later = [commlab.allreduce_async(torch.full((50_001,), float(at + group.rank)), "sum", group=group)
                 for at in range(3)]  # fmt: skip
        group.barrier()
        for at, handle in enumerate(later):
            assert (handle.wait() == sum(range(group.size)) + at * group.size).all()
    group.barrier()
    group.close()


@pytest.mark.mpi(min_size=4)
def test_hierarchical_over_links() -> None:
    """The window on each node, programs between the nodes; and the leaders for who waits, with the same bits."""
    group = linked(2)
    open_nodes(group)
    assert pick(group, "allreduce", "auto", 100_003, torch.float32)[0] == "hierarchical"
    for dtype, op in ((torch.float32, "mean"), (torch.bfloat16, "mean"), (torch.int64, "sum")):
        tensor = numbers(group.rank, 100_003, dtype, op)
        commlab.allreduce_async(tensor, op, group=group).wait()
        want = expected(op, group.size, 100_003, dtype)
        assert torch.allclose(tensor.double(), want.double(), rtol=2**-7, atol=2**-7 if dtype.itemsize == 2 else 0)
        again = commlab.allreduce(numbers(group.rank, 100_003, dtype, op), op, group=group)
        assert same_bits(again, tensor)
    group.barrier()
    group.close()


@pytest.mark.mpi(min_size=4)
def test_few_numbers_by_leaders() -> None:
    """Processes of their own on nodes of 3, of 1 and of all other ranks: exact, and ranks that disagree are told."""
    size = MpiTransport().size
    group = linked(f"0-2,3,4-{size - 1}" if size > 4 else "0-2,3")
    open_nodes(group)
    assert group.leaders is not None
    for at in range(60):
        dtype = DTYPES[at % len(DTYPES)]
        op, numel = ops_for(dtype)[at % len(ops_for(dtype))], (1, 100, 3000, 8192)[at // len(DTYPES) % 4]
        tensor = numbers(group.rank, numel, dtype, op)
        commlab.allreduce(tensor, op, group=group)
        assert torch.equal(tensor, expected(op, size, numel, dtype)), (dtype, op, numel)
    for wrong in range(size):
        with pytest.raises(DisagreementError, match=rf"rank {wrong}: allreduce #\d+ of float32\[6\]"):
            commlab.allreduce(torch.ones(5 + (group.rank == wrong)), group=group)
    group.barrier()
    group.close()


def test_the_choice_is_given_with_both_figures() -> None:
    group = linked(1, "auto")
    if group.size > 1:
        assert "1 MB each way takes links" in group.links_reason and "and mpi" in group.links_reason
    sums = torch.ones(10)
    commlab.allreduce(sums, "sum", group=group)
    assert (sums == group.size).all()
    group.barrier()
    group.close()


def test_an_interface_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="nosuch0"):
        linked(1, iface="nosuch0")


def test_messages_in_any_order_and_size() -> None:
    """What the parameter server sends: messages beside the operations, of any length."""
    group = linked(1)
    transport = group.split(range(group.size), any_order=True)
    assert transport is not None
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    if group.size > 1:
        for size_bytes in (1, 4096, 262_144, 262_145, 1_000_003):
            sent = np.full(size_bytes, group.rank, np.uint8)
            arrived = np.empty(size_bytes, np.uint8)
            requests = [transport.irecv(arrived, left), transport.isend(sent, right)]
            while not all(request.test() for request in requests):
                pass
            assert (arrived == left).all()
    transport.close()
    group.barrier()
    group.close()
