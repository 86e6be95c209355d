"""A node's collectives in one native call, with threads as ranks: every way that the numbers may go, ranks that are
late and go on in steps, and rooms that are used again while others may still read."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from bits import needs_native
from closed_form import DTYPES, HALVES, expected, numbers, ops_for
from node_threads import MEMORY, PATIENCE_US, SharedNode
from torch import Tensor

from commlab.chunks import Range, split, whole_at
from commlab.native import library
from commlab.native.dtypes import MOVED, OP_CODES

pytestmark = needs_native

NOWHERE = 2**64 - 1


class CollectiveNode(SharedNode):
    def collective(
        self,
        rank: int,
        moves: str,
        chunks: Sequence[Range],
        dtype: torch.dtype,
        op: str = "sum",
        wire: torch.dtype | None = None,
        to_rooms: bool = True,
    ) -> Any:
        divisor, reduction = (self.size, "sum") if op == "mean" else (1, op)
        return self.native.NodeCollective(
            self.syncs[rank],
            self.mapped[rank],
            MOVED[dtype][0],
            MOVED[wire or dtype][0],
            OP_CODES[reduction],
            divisor,
            moves != "gather",
            moves != "reduce",
            [tuple(chunk) for chunk in chunks],
            to_rooms,
        )

    def place(self, rank: int, tensor: Tensor) -> Tensor:
        """A copy in the memory that ranks share."""
        placed = self.memory[rank].view(torch.uint8)[64 * rank : 64 * rank + tensor.nbytes].view(tensor.dtype)
        return placed.copy_(tensor)

    def go_on(self, rank: int, native: Any, data: Tensor, out: Tensor | None, left: int) -> int:
        """What the long way does with an operation that has been announced, or is under way; the way that it went."""
        if left == native.ANNOUNCED:
            assert self.syncs[rank].wait(PATIENCE_US) == -1 and self.syncs[rank].agreed()
            for of in range(self.size):
                self.map_staging(rank, of)
            result = data if out is None else out
            native.move(data.data_ptr(), 0 if out is None else out.data_ptr(), MOVED[result.dtype][0], False)
        way: int = native.way
        assert native.run(PATIENCE_US) == -1
        return way


def wanted(moves: str, rank: int, size: int, chunks: Sequence[Range], dtype: torch.dtype, op: str) -> Tensor:
    """All of an allreduce, this rank's chunk of a reduction, everyone's chunks of a gather."""
    numel = chunks[-1].stop
    if moves == "gather":
        return torch.cat([numbers(peer, numel, dtype)[slice(*chunk)] for peer, chunk in enumerate(chunks)])
    whole = expected(op, size, numel, dtype)
    return whole if moves == "allreduce" else whole[slice(*chunks[rank])]


@pytest.mark.parametrize("moves", ["allreduce", "reduce", "gather"])
@pytest.mark.parametrize("place", ["ordinary", "window", "mixed", "unmapped", "large", "one is against rooms"])
def test_each_way(place: str, moves: str) -> None:
    """By all dtypes, into an ``out`` and in place; which way is seen by what all ranks publish."""
    for size in (2, 3, 5):
        node = CollectiveNode(size)
        for at, dtype in enumerate(DTYPES):
            op = "sum" if moves == "gather" else ops_for(dtype)[(at + size) % len(ops_for(dtype))]
            numel = (1, 777, 16_411)[at % 3]
            for chunks in (split(numel, size), whole_at(size - 1, numel, size)):
                ways, results = [-1] * size, [torch.empty(0)] * size

                def work(rank: int) -> None:
                    mine = numbers(rank, numel, dtype, op if moves != "gather" else "sum")  # noqa: B023
                    if place == "window" or (place == "mixed" and rank == 1):
                        mine = node.place(rank, mine)  # noqa: B023
                    if place == "unmapped" and rank == 1:
                        node.mapped[1].drop(0, 0)  # noqa: B023
                    own = chunks[rank]  # noqa: B023
                    out = mine.new_full((own.numel,), 9) if moves == "reduce" and at % 2 else None  # noqa: B023
                    to_rooms = place != "large" and (place != "one is against rooms" or rank == 1)
                    native = node.collective(rank, moves, chunks, dtype, op, to_rooms=to_rooms)  # noqa: B023
                    end = native.call(7, 0, mine.data_ptr(), 0 if out is None else out.data_ptr(), PATIENCE_US)
                    if end in (native.ANNOUNCED, native.UNDER_WAY):
                        end = node.go_on(rank, native, mine, out, end)  # noqa: B023
                    ways[rank] = end  # noqa: B023
                    if out is not None:
                        assert torch.equal(mine, numbers(rank, numel, dtype, op)), "data were written"  # noqa: B023
                    results[rank] = (  # noqa: B023
                        out if out is not None else mine[slice(*own)] if moves == "reduce" else mine
                    ).clone()

                node.run(work)
                native = library.built.NodeCollective
                way = {"ordinary": native.AT_ONCE, "window": native.IN_PLACE}.get(place, native.PIPED)
                assert ways == [way] * size
                for rank, result in enumerate(results):
                    want = wanted(moves, rank, size, chunks, dtype, op)
                    assert torch.equal(result, want), (size, dtype, op, rank)


@pytest.mark.parametrize("wire", HALVES, ids=str)
def test_a_wire_goes_by_blocks(wire: torch.dtype) -> None:
    node = CollectiveNode(3)
    data = [numbers(rank, 5000, torch.float16).float() for rank in range(3)]
    chunks = split(5000, 3, align=32)

    def work(rank: int) -> None:
        native = node.collective(rank, "allreduce", chunks, torch.float32, "sum", wire, to_rooms=False)
        placed = node.place(rank, data[rank])
        assert native.call(7, 0, placed.data_ptr(), 0, PATIENCE_US) == native.PIPED
        data[rank] = placed

    node.run(work)
    for each in data:
        assert torch.equal(each, expected("sum", 3, 5000, torch.float16).float())


@pytest.mark.parametrize("seed", range(12))
def test_one_after_the_other_with_late_ranks(seed: int) -> None:
    """Operations of all kinds and ways without a wait between them, by ranks that nap, and that give up waiting after a
    moment and go on in steps."""
    size = 2 + seed % 3
    node, draw = CollectiveNode(size), random.Random(seed)
    rounds = []
    for index in range(60):
        numel = draw.choice((1, 500, 16_000, 70_001))
        placed = draw.choice((0, 0, 0, size, draw.randrange(size)))
        chunks = split(numel, size) if draw.random() < 0.7 else whole_at(draw.randrange(size), numel, size)
        rounds.append((index, draw.choice(("allreduce", "reduce", "gather")), numel, placed, chunks))

    def work(rank: int) -> None:
        own_draw = random.Random(100 * seed + rank)
        for index, moves, numel, placed, chunks in rounds:
            mine = numbers(rank + index % 7, numel, torch.int32)
            if rank < placed:
                mine = node.place(rank, mine)
            if own_draw.random() < 0.15:
                time.sleep(own_draw.choice((1e-4, 2e-3)))
            native = node.collective(rank, moves, chunks, torch.int32)
            patience_us = own_draw.choice((0.0, 50.0, PATIENCE_US))
            end = native.call(7, index, mine.data_ptr(), 0, patience_us)
            if end in (native.ANNOUNCED, native.UNDER_WAY):
                node.go_on(rank, native, mine, None, end)
            parts = [numbers(peer + index % 7, numel, torch.int32) for peer in range(size)]
            if moves == "gather":
                want = torch.cat([part[slice(*chunk)] for part, chunk in zip(parts, chunks, strict=True)])
            else:
                want = torch.stack(parts).sum(0).to(torch.int32)
            got = mine
            if moves == "reduce":
                got, want = mine[slice(*chunks[rank])], want[slice(*chunks[rank])]
            assert torch.equal(got, want), (index, moves, numel, placed)

    node.run(work)


def test_who_disagrees_finds_nothing_moved() -> None:
    node = CollectiveNode(2)
    data = [numbers(rank, 1000, torch.float32) for rank in range(2)]

    def work(rank: int) -> None:
        native = node.collective(rank, "allreduce", split(1000, 2), torch.float32)
        assert native.call(rank, 0, data[rank].data_ptr(), 0, PATIENCE_US) == native.ANNOUNCED
        assert not node.syncs[rank].agreed()

    node.run(work)
    for rank, each in enumerate(data):
        assert torch.equal(each, numbers(rank, 1000, torch.float32))


def test_squares_of_what_lies_in_the_window() -> None:
    node = CollectiveNode(2)
    chunks = split(1000, 2, align=16)
    found = [0.0, 0.0]

    def work(rank: int) -> None:
        placed = node.place(rank, numbers(rank, 1000, torch.float32))
        native = node.collective(rank, "allreduce", chunks, torch.float32)
        node.syncs[rank].publish(3, MEMORY, 64 * rank, 0, 0)
        assert node.syncs[rank].wait(PATIENCE_US) == -1 and native.way == native.IN_PLACE
        native.move(placed.data_ptr(), 0, MOVED[torch.float32][0], True)
        assert native.run(PATIENCE_US) == -1
        found[rank] = native.squares

    node.run(work)
    for rank, squares in enumerate(found):
        own = expected("sum", 2, 1000, torch.float32)[slice(*chunks[rank])].double()
        assert squares == pytest.approx(float(own.square().sum()), rel=1e-6)


def test_places() -> None:
    """What lies in a rank's own memory, whole; and what peers have published, no further than their memory goes."""
    mapped = library.built.Mappings(2, 1)
    memory = torch.zeros(1000, dtype=torch.uint8)
    start = memory.data_ptr()
    assert mapped.locate(start, 10) == (NOWHERE, 0)
    mapped.add(1, 5, start, 1000)
    mapped.add(0, 5, start + 1, 999)
    assert mapped.locate(start, 1000) == (5, 0)
    assert mapped.locate(start + 990, 10) == (5, 990)
    assert mapped.locate(start + 990, 11) == (NOWHERE, 0)
    assert mapped.locate(start - 1, 5) == (NOWHERE, 0)
    assert mapped.at(0, 5, 9, 990) == start + 10
    for place in ((0, 5, 9, 991), (0, 5, 2**64 - 8, 16), (0, 6, 0, 1)):
        assert mapped.at(*place) == 0
    mapped.drop(1, 5)
    mapped.drop(1, 5)
    assert mapped.locate(start, 10) == (NOWHERE, 0) and mapped.at(0, 5, 0, 1) == start + 1


def test_misuse_is_refused() -> None:
    node = CollectiveNode(2)
    data = torch.ones(8)
    with pytest.raises(ValueError, match="one chunk per rank"):
        node.collective(0, "allreduce", split(8, 3), torch.float32)
    with pytest.raises(ValueError, match="a room has 512 KiB"):
        node.collective(0, "allreduce", split(2**18, 2), torch.float32)
    with pytest.raises(ValueError, match="travel as they are"):
        node.collective(0, "allreduce", split(8, 2), torch.float32, wire=torch.float16)
    native = node.collective(0, "allreduce", split(8, 2), torch.float32)
    node.mapped[0].drop(0, 0)
    with pytest.raises(RuntimeError, match="no staging segment"):
        native.call(7, 0, data.data_ptr(), 0, 0.0)
    with pytest.raises(RuntimeError, match="is not mapped"):
        native.move(data.data_ptr(), 0, MOVED[torch.float32][0], False)
    assert (data == 1).all()
