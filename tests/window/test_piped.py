"""Ordinary memory through the staging areas, with threads as the ranks of a node: many blocks, each smaller than what
it carries, in every order in which the ranks may come."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
from bits import assert_same_bits, needs_native
from closed_form import DTYPES, HALVES, expected, numbers, ops_for
from hypothesis import given, settings
from hypothesis import strategies as st
from node_threads import PATIENCE_US, Node
from torch import Tensor

from commlab.chunks import Range, split, whole_at

pytestmark = needs_native


def reduced(parts: Sequence[Tensor], divisor: float, into: torch.dtype) -> Tensor:
    """In rank order, in fp32 where the parts have 16 bits, rounded once."""
    total = parts[0].float() if parts[0].dtype in HALVES else parts[0].clone()
    for part in parts[1:]:
        total = total + part.to(total.dtype)
    return (total / divisor).to(into)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_allreduce_of_many_blocks(dtype: torch.dtype) -> None:
    for size, block_bytes in ((2, 128), (3, 256), (5, 320)):
        node = Node(size, block_bytes)
        for op in ops_for(dtype):
            for numel in (1, 5, 64, 1000):
                data = [numbers(rank, numel, dtype, op) for rank in range(size)]
                chunks = split(numel, size, align=8)

                def work(rank: int) -> None:
                    divisor, reduction = (size, "sum") if op == "mean" else (1, op)  # noqa: B023
                    piped = node.piped(rank, data[rank], "reduce gather", chunks, reduction, divisor)  # noqa: B023
                    assert piped.run(PATIENCE_US) == -1
                    assert piped.run(0.0) == -1, "done stays done"
                    node.meet(rank)  # noqa: B023

                node.run(work)
                for each in data:
                    assert torch.equal(each, expected(op, size, numel, dtype)), (size, op, numel)


@pytest.mark.parametrize("wire", HALVES, ids=str)
def test_a_16_bit_wire_rounds_contributions_and_result(wire: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (2, 3, 4):
        node = Node(size, 192 * size)
        data = [torch.randn(777, generator=generator) * 100 for _ in range(size)]
        want = reduced([each.to(wire) for each in data], size, wire).float()
        chunks = split(777, size, align=32)

        def work(rank: int) -> None:
            piped = node.piped(rank, data[rank], "reduce gather", chunks, "sum", size, wire)  # noqa: B023
            assert piped.run(PATIENCE_US) == -1

        node.run(work)
        for each in data:
            assert_same_bits(each, want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_reduction_leaves_fp32_sums_where_it_is_told_to(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    size, numel = 3, 1001
    node = Node(size, 512)
    data = [(torch.randn(numel, generator=generator) * 100).to(dtype) for _ in range(size)]
    before = [each.clone() for each in data]
    chunks = (Range(0, 500), Range(500, 500), Range(500, numel))
    wides = [torch.full((chunk.numel + 2,), 7.0) for chunk in chunks]

    def work(rank: int) -> None:
        piped = node.piped(rank, data[rank], "reduce", chunks, "sum", 3, None, wides[rank][1:])
        assert piped.run(PATIENCE_US) == -1

    node.run(work)
    for rank, chunk in enumerate(chunks):
        want = reduced([each[chunk.start : chunk.stop] for each in before], 3, torch.float32)
        assert_same_bits(wides[rank][1:-1], want)
        assert wides[rank][0] == wides[rank][-1] == 7
        assert_same_bits(data[rank], before[rank])


@settings(max_examples=60)
@given(
    size=st.integers(2, 5),
    block_lines=st.integers(5, 9),
    numels=st.lists(st.integers(0, 300), min_size=5, max_size=5),
    naps=st.randoms(use_true_random=False),
)
def test_ranks_that_come_when_they_like(size: int, block_lines: int, numels: list[int], naps: object) -> None:
    """Reduce, gather, both, and a broadcast, one after the other, with chunks of any size, some of them empty; ranks
    stop and come back at any wait, as those do that compute meanwhile."""
    node = Node(size, 64 * block_lines)
    stops = [sum(numels[: rank + 1]) for rank in range(size)]
    chunks = [Range(stop - numels[rank], stop) for rank, stop in enumerate(stops)]
    numel = stops[-1]
    given_data = [numbers(rank, numel, torch.float32) for rank in range(size)]
    total = expected("sum", size, numel, torch.float32)
    naps_of = [[naps.random() < 0.1 for _ in range(50)] for _ in range(size)]  # type: ignore[attr-defined]
    results: list[dict[str, Tensor]] = [{} for _ in range(size)]

    def work(rank: int) -> None:
        def finish(name: str, moves: str, cut: Sequence[Range]) -> None:
            mine = given_data[rank].clone()
            piped = node.piped(rank, mine, moves, cut)
            turn, calls = -1, 0
            while piped.run(0.0) >= 0:  # type: ignore[attr-defined]
                now = piped.tick  # type: ignore[attr-defined]
                assert now >= turn
                turn, calls = now, calls + 1
                if naps_of[rank][calls % 50]:
                    time.sleep(1e-4)
                else:
                    piped.run(1e3)  # type: ignore[attr-defined]
            node.meet(rank)
            results[rank][name] = mine

        finish("reduce", "reduce", chunks)
        finish("gather", "gather", chunks)
        finish("both", "reduce gather", chunks)
        finish("broadcast", "gather", whole_at(size - 1, numel, size))
        finish("to one", "reduce", whole_at(1, numel, size))

    node.run(work)
    gathered = torch.cat([given_data[rank][slice(*chunk)] for rank, chunk in enumerate(chunks)])
    for rank, got in enumerate(results):
        own = chunks[rank]
        assert torch.equal(got["reduce"][slice(*own)], total[slice(*own)])
        assert torch.equal(got["reduce"][: own.start], given_data[rank][: own.start]), "another's chunk was written"
        assert torch.equal(got["reduce"][own.stop :], given_data[rank][own.stop :])
        assert torch.equal(got["gather"], gathered)
        assert torch.equal(got["both"], total)
        assert torch.equal(got["broadcast"], given_data[-1])
        assert torch.equal(got["to one"], total if rank == 1 else given_data[rank])


def test_misuse_is_refused() -> None:
    node = Node(2, 128)
    data = torch.ones(8)
    chunks = split(8, 2)
    for message, call in {
        "one staging area and one chunk per rank": lambda: node.piped(0, data, "reduce", chunks[:1]),
        "16-bit, for fp32 data": lambda: node.piped(0, data.double(), "reduce gather", chunks, wire=torch.float16),
        "is for allreduce": lambda: node.piped(0, data, "reduce", chunks, wire=torch.float16),
        "too small for so many ranks": lambda: Node(3, 128).piped(0, data, "reduce", split(192, 3, align=64)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert (data == 1).all()
