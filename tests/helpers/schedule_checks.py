"""What every schedule has to pass, whichever algorithm it is: exact on 1..17 simulated ranks, and as many messages and
bytes as its steps say.

``tests/schedules/test_schedules.py`` holds every row of the table to it; ``tests/test_docs.py`` the worked example of
docs/add-an-algorithm.md, which is a row for the length of a test. ``name`` is a row of ``ALGORITHMS``.
"""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import torch
from closed_form import NUMELS, expected, numbers
from simulated import simulate

from commlab.chunks import Range, split, whole_at
from commlab.runtime.operand import Operand
from commlab.schedules import ALGORITHMS, compose
from commlab.schedules.step import Step, elements_sent
from commlab.transport.sim import SimNetwork

SIZES = range(1, 18)
SMALL_SEGMENT_BYTES = 7 * 8
"""7 or 14 numbers: chunks of 64 and 200 numbers end in ragged segments."""
SEGMENTS = (None, SMALL_SEGMENT_BYTES)
OPS = ("sum", "mean", "prod")
DTYPES = (torch.float64, torch.int32)
ROOTED = ((0, None), (1, None), (5, None), (64, 28))
"""Numbers, and bytes of a segment, with which operations that have a root are checked."""


def buffers(size: int, numel: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [numbers(rank, numel, dtype) for rank in range(size)]


def check_allreduce(name: str, segment_bytes: int | None, op: str) -> None:
    """An allreduce gives the closed form on every rank."""
    algorithm = ALGORITHMS[name]
    for size in SIZES:
        for numel in NUMELS if segment_bytes is None else (64, 200):
            data = [numbers(rank, numel, torch.float32, op) for rank in range(size)]
            operands = [Operand(each, "sum" if op == "mean" else op, size if op == "mean" else 1) for each in data]
            simulate(lambda rank, n=numel, p=size: compose.allreduce(algorithm, rank, p, n), operands, segment_bytes)
            for rank, got in enumerate(data):
                assert torch.equal(got, expected(op, size, numel, torch.float32)), (size, numel, rank)


def check_reduce_scatter_and_allgather(name: str, segment_bytes: int | None, dtype: torch.dtype) -> None:
    """The two halves of an allreduce, on chunks that ``split`` cuts."""
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


def check_reduce_and_broadcast(name: str, numel: int, segment_bytes: int | None) -> None:
    """Operations with a root: with few numbers for every root, else for the first, a middle and the last rank."""
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


def check_what_the_network_carries(name: str) -> None:
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


def check_owners(name: str) -> None:
    """The owners' chunks adjoin, and together are the buffer."""
    for size in SIZES:
        for numel in NUMELS:
            chunks = ALGORITHMS[name].owners(numel, size)
            assert len(chunks) == size
            assert chunks[0].start == 0
            assert chunks[-1].stop == numel
            assert all(left.stop == right.start for left, right in pairwise(chunks))


def check_nothing_to_send(name: str) -> None:
    """Nobody sends to itself, and nobody sends nothing."""
    algorithm = ALGORITHMS[name]
    for plan in (compose.allreduce(algorithm, 0, 1, 100), compose.allgather(algorithm, 3, (Range(0, 0),) * 5)):
        assert not [item for item in plan if isinstance(item, Step)]
    assert not [item for item in compose.reduce_scatter(algorithm, 2, whole_at(1, 0, 4)) if isinstance(item, Step)]
