"""Every algorithm as every operation on 1..17 simulated ranks: exact, and with the messages that its page promises."""

from __future__ import annotations

from itertools import pairwise
from math import ceil, log2

import pytest
import torch
from closed_form import NUMELS, expected, numbers
from simulated import rounds, simulate

from commlab.chunks import Range, split, whole_at
from commlab.collectives.select import TABLE, Case, choose
from commlab.errors import UsageError
from commlab.runtime.operand import Operand
from commlab.schedules import ALGORITHMS, compose
from commlab.schedules.step import AnyStep, Schedule, Step, elements_sent, messages_sent
from commlab.transport.sim import SimNetwork

SIZES = range(1, 18)
SMALL_SEGMENT_BYTES = 7 * 8  # 7 or 14 numbers: chunks of 64 and 200 numbers end in ragged segments

algorithms = pytest.mark.parametrize("name", ALGORITHMS)
segments = pytest.mark.parametrize("segment_bytes", [None, SMALL_SEGMENT_BYTES], ids=["whole", "segmented"])


def buffers(size: int, numel: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [numbers(rank, numel, dtype) for rank in range(size)]


@algorithms
@segments
@pytest.mark.parametrize("op", ["sum", "mean", "prod"])
def test_allreduce(name: str, segment_bytes: int | None, op: str) -> None:
    algorithm = ALGORITHMS[name]
    for size in SIZES:
        for numel in NUMELS if segment_bytes is None else (64, 200):
            data = [numbers(rank, numel, torch.float32, op) for rank in range(size)]
            operands = [Operand(each, "sum" if op == "mean" else op, size if op == "mean" else 1) for each in data]
            simulate(lambda rank, n=numel, p=size: compose.allreduce(algorithm, rank, p, n), operands, segment_bytes)
            for rank, got in enumerate(data):
                assert torch.equal(got, expected(op, size, numel, torch.float32)), (size, numel, rank)


@algorithms
@segments
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_reduce_scatter_and_allgather(name: str, segment_bytes: int | None, dtype: torch.dtype) -> None:
    algorithm = ALGORITHMS[name]
    for size in SIZES:
        for numel in NUMELS if segment_bytes is None else (64, 200):
            chunks, total = split(numel, size), expected("sum", size, numel, dtype)
            data = buffers(size, numel, dtype)
            simulate(lambda rank, c=chunks: compose.reduce_scatter(algorithm, rank, c), data, segment_bytes)
            parts = [data[rank][own.start : own.stop] for rank, own in enumerate(chunks)]
            assert torch.equal(torch.cat(parts), total), (size, numel)

            data = buffers(size, numel, dtype)
            parts = [data[rank][own.start : own.stop].clone() for rank, own in enumerate(chunks)]
            simulate(lambda rank, c=chunks: compose.allgather(algorithm, rank, c), data, segment_bytes)
            for rank, got in enumerate(data):
                assert torch.equal(got, torch.cat(parts)), (size, numel, rank)


@algorithms
@pytest.mark.parametrize(("numel", "segment_bytes"), [(0, None), (1, None), (5, None), (64, 28)])
def test_reduce_and_broadcast_with_every_root(name: str, numel: int, segment_bytes: int | None) -> None:
    algorithm = ALGORITHMS[name]
    for size in SIZES:
        total = expected("mean", size, numel, torch.float32)
        for root in range(size) if numel == 5 else {0, size // 2, size - 1}:
            data = buffers(size, numel)
            operands = [Operand(each, "sum", size) for each in data]
            simulate(
                lambda rank, p=size, at=root: compose.reduce(algorithm, rank, p, numel, at), operands, segment_bytes
            )
            assert torch.equal(data[root], total), (size, root)

            data = buffers(size, numel)
            simulate(
                lambda rank, p=size, at=root: compose.broadcast(algorithm, rank, p, numel, at), data, segment_bytes
            )
            for rank, got in enumerate(data):
                assert torch.equal(got, numbers(root, numel, torch.float32)), (size, root, rank)


@algorithms
def test_the_network_carries_what_the_schedule_says(name: str) -> None:
    """Messages and bytes counted on the wire = those of the steps, segment by segment; and nobody sends to itself."""
    algorithm = ALGORITHMS[name]
    for size, numel, segment_bytes in ((1, 100, 40), (5, 1000, 40), (8, 64, 4), (13, 1000, 1 << 20)):
        plans = [list(compose.allreduce(algorithm, rank, size, numel)) for rank in range(size)]
        network = SimNetwork(size)
        executions = simulate(lambda rank, p=plans: iter(p[rank]), buffers(size, numel), segment_bytes, network)
        for rank, (plan, execution) in enumerate(zip(plans, executions, strict=True)):
            sent = [numbytes for frm, _, numbytes in network.messages if frm == rank]
            assert sum(sent) == execution.bytes_sent == 4 * elements_sent(plan)
            in_segments = sum(ceil(4 * item.send.numel / segment_bytes) for item in plan if isinstance(item, Step))
            assert len(sent) == execution.messages_sent == in_segments
        assert all(frm != to for frm, to, _ in network.messages)


def allreduces(name: str, size: int, numel: int) -> list[list[AnyStep]]:
    return [list(compose.allreduce(ALGORITHMS[name], rank, size, numel)) for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["ring", "direct"])
def test_cost_of_ring_and_direct(name: str, size: int) -> None:
    """2 (P-1) steps and messages, 2 n (P-1)/P elements on every rank."""
    for plan in allreduces(name, size, 10 * size):
        assert sum(isinstance(item, Step) for item in plan) == messages_sent(plan) == 2 * (size - 1)
        assert elements_sent(plan) == 2 * 10 * (size - 1)
    assert rounds(allreduces(name, size, 10 * size)) == 2 * (size - 1)


@pytest.mark.parametrize("size", SIZES)
def test_ring_talks_to_neighbours_only(size: int) -> None:
    for rank, plan in enumerate(allreduces("ring", size, 10 * size)):
        assert {item.to for item in plan if isinstance(item, Step)} <= {(rank + 1) % size}
        assert {item.frm for item in plan if isinstance(item, Step)} <= {(rank - 1) % size}


@pytest.mark.parametrize("size", SIZES)
def test_cost_of_halving(size: int) -> None:
    """2 floor(log2 P) steps and 2 n (Q-1)/Q elements; where ranks are too many, 2 steps more, and of each pair the odd
    rank sends n more and the even one n in all."""
    places = 1 << int(log2(size))
    folded = size - places
    numel = 16 * places
    plans = allreduces("halving", size, numel)
    assert rounds(plans) == 2 * int(log2(size)) + (2 if folded else 0)
    halves = 2 * numel * (places - 1) // places
    for rank, plan in enumerate(plans):
        in_pair = rank < 2 * folded
        assert elements_sent(plan) == (numel if in_pair and rank % 2 == 0 else halves + numel * in_pair)


@pytest.mark.parametrize("size", SIZES)
def test_cost_of_tree(size: int) -> None:
    """2 ceil(log2 P) steps; n up from all but the root; at most n ceil(log2 P) down, and the root sends just that."""
    height = ceil(log2(size))
    plans = allreduces("tree", size, 50)
    assert rounds(plans) == 2 * height
    assert elements_sent(plans[0]) == 50 * height
    assert all(elements_sent(plan) <= 50 * (1 + height) for plan in plans)
    assert sum(map(elements_sent, plans)) == 2 * 50 * (size - 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [compose.reduce, compose.broadcast])
def test_cost_with_a_root(kind: type[Schedule], size: int) -> None:
    """Everything crosses P - 1 links once, in all algorithms but halving; the tree takes ceil(log2 P) steps."""
    for root in {0, size // 2, size - 1}:
        for name in ("ring", "tree", "direct"):
            plans = [list(kind(ALGORITHMS[name], rank, size, 30, root)) for rank in range(size)]
            assert sum(map(elements_sent, plans)) == 30 * (size - 1), name
            if name == "ring":
                assert all(elements_sent(plan) in (0, 30) for plan in plans)
            if name == "tree":
                assert rounds(plans) == ceil(log2(size))


@algorithms
def test_owners_cover_the_buffer(name: str) -> None:
    for size in SIZES:
        for numel in NUMELS:
            chunks = ALGORITHMS[name].owners(numel, size)
            assert len(chunks) == size
            assert chunks[0].start == 0
            assert chunks[-1].stop == numel
            assert all(left.stop == right.start for left, right in pairwise(chunks))


@algorithms
def test_one_rank_and_nothing_to_send_need_no_step(name: str) -> None:
    algorithm = ALGORITHMS[name]
    for plan in (compose.allreduce(algorithm, 0, 1, 100), compose.allgather(algorithm, 3, (Range(0, 0),) * 5)):
        assert not [item for item in plan if isinstance(item, Step)]
    assert not [item for item in compose.reduce_scatter(algorithm, 2, whole_at(1, 0, 4)) if isinstance(item, Step)]


def test_select() -> None:
    """The table has a row for every case, its names exist, and others are refused with a list of those that do."""
    for kind in ("allreduce", "reduce_scatter", "allgather", "reduce", "broadcast"):
        for size in SIZES:
            for numbytes in (0, 4, 1 << 14, 1 << 20, 1 << 30):
                for half in (False, True):
                    name, reason = choose("auto", Case(kind, size, numbytes, half, "mpi"), tuple(ALGORITHMS))
                    assert name in ALGORITHMS
                    assert reason
    assert choose("auto", Case("allreduce", 8, 1 << 20, True, "mpi"), ())[0] == "direct"
    assert all(row.reason for row in TABLE)
    for kind, wanted in (
        ("allreduce", "direct"),
        ("reduce_scatter", "direct"),
        ("reduce", "ring"),
        ("broadcast", "ring"),
    ):
        # One rank would take in (P - 1) n over its link.
        assert choose("auto", Case(kind, 4, 1 << 19, True, "mpi", nodes=4), tuple(ALGORITHMS))[0] == wanted
    assert choose("tree", Case("allreduce", 8, 1 << 30, True, "mpi"), tuple(ALGORITHMS))[0] == "tree"
    with pytest.raises(UsageError, match=r"'rnig'.*ring, halving, tree, direct"):
        choose("rnig", Case("allreduce", 8, 4, False, "mpi"), tuple(ALGORITHMS))
