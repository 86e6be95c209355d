"""Deliveries among a node's ranks in one native call, with threads as ranks: streams of all lengths side by side, ranks
that are late and go on in steps, rooms that not everyone has mapped, sizes that do not agree."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from bits import needs_native
from node_threads import PATIENCE_US, SharedNode
from torch import Tensor

from commlab.chunks import Range, adjoining
from commlab.window.delivery import ANY, ROWS, addresses

pytestmark = needs_native

PAGE, ROOM, HALF = 2**16, 2**19, 2**21
"""What a control page holds with the table, a room, and what a round moves of a stream."""


def content(frm: int, to: int, size_bytes: int, seed: int = 0) -> Tensor:
    """What rank ``frm`` has for rank ``to``: other bytes for each pair and place."""
    return (torch.arange(size_bytes, dtype=torch.int32) * 7 + frm * 31 + to * 101 + seed * 17).to(torch.uint8)


class Sent:
    """A rank's side of a delivery in which rank ``a`` has ``sizes[a][b]`` bytes for rank ``b``; in pieces, or as one
    tensor (``whole``). ``blind``: it takes what comes."""

    def __init__(
        self,
        node: SharedNode,
        rank: int,
        sizes: Sequence[Sequence[int]],
        seed: int = 0,
        whole: bool = False,
        blind: bool = False,
    ):
        self.node, self.rank, self.sizes, self.seed = node, rank, sizes, seed
        parts = [content(rank, to, size_bytes, seed) for to, size_bytes in enumerate(sizes[rank])]
        self.stream = [torch.cat(parts)] if whole else parts
        self.outs = [torch.full((of[rank],), 0xEE, dtype=torch.uint8) for of in sizes]
        expected = [ANY] * node.size if blind else [out.numel() for out in self.outs]
        self.native: Any = self.made(adjoining(sizes[rank]), expected)

    def made(self, ranges: Sequence[Range], expected: Sequence[int]) -> Any:
        return self.node.native.NodeDelivery(
            self.node.syncs[self.rank],
            self.node.mapped[self.rank],
            addresses(self.stream),
            [tuple(span) for span in ranges],
            list(expected),
        )

    def call(self, sequence: int, patience_us: float = PATIENCE_US) -> int:
        end: int = self.native.call(5, sequence, 0, addresses(self.outs), patience_us)
        return end

    def go_on(self, left: int) -> None:
        """What the long way does with what has been announced, or is under way."""
        if left == self.native.ANNOUNCED:
            sync = self.node.syncs[self.rank]
            assert sync.wait(PATIENCE_US) == -1 and sync.agreed() and self.native.sizes_agree()
            assert [self.native.size_from(peer) for peer in range(self.node.size)] == [
                of[self.rank] for of in self.sizes
            ]
            for peer in range(self.node.size):
                if self.native.needs_staging_of(peer):
                    self.node.map_staging(self.rank, peer)
            self.native.move(addresses(self.outs))
        assert self.native.run(PATIENCE_US) == -1

    def right(self) -> None:
        for frm, out in enumerate(self.outs):
            want = content(frm, self.rank, self.sizes[frm][self.rank], self.seed)
            assert torch.equal(out, want), (frm, self.rank, self.sizes)


EDGE = PAGE - 8 * ROWS * 3
"""The longest stream that three ranks publish in a page."""
LENGTHS = [
    [[5, 1, 7]] * 3,
    [[0, 0, 0]] * 3,
    [[EDGE - 2, 1, 1], [EDGE - 1, 1, 1], [1, 0, 0]],
    [[0, ROOM, 0], [0, 0, ROOM + 1], [3, 5, 7]],
    [[HALF - 1, 2, HALF], [1, 1, 1], [ROOM // 2, 0, ROOM // 2]],
    [[3 * HALF + 5, 0, 0], [0, 0, 0], [70_000, 2 * HALF, 1]],
]
"""In a page, a room and rounds, at their edges, side by side; nothing at all."""


@pytest.mark.parametrize("sizes", LENGTHS, ids=lambda sizes: str(max(map(sum, sizes))))
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "unmapped"])
def test_each_way(sizes: Sequence[Sequence[int]], mapped: bool) -> None:
    """Also where ranks know no staging area but their own yet."""
    node = SharedNode(3)

    def work(rank: int) -> None:
        for peer in range(3):
            if peer != rank and not mapped:
                node.mapped[rank].drop(peer, 0)
        sent = Sent(node, rank, sizes, whole=rank == 1)
        end = sent.call(0)
        reads = any(sent.native.needs_staging_of(peer) for peer in range(3) if peer != rank)
        assert end == (sent.native.ANNOUNCED if reads and not mapped else sent.native.DONE)
        if end != sent.native.DONE:
            sent.go_on(end)
        sent.right()

    node.run(work)


@pytest.mark.parametrize(("without", "rounds"), [(1, 1), (2, 0), (None, 0)])
def test_a_room_is_for_those_who_read_it(without: int | None, rounds: int) -> None:
    """Rank 0's stream lies in its room if rank 1, which reads it, has mapped that; whatever rank 2 has."""
    node = SharedNode(3)
    ticks = []

    def work(rank: int) -> None:
        if rank == without:
            node.mapped[rank].drop(0, 0)
        sent = Sent(node, rank, [[0, 100_000, 0], [9, 9, 9], [0, 0, 0]])
        end = sent.call(0)
        if end != sent.native.DONE:
            sent.go_on(end)
        sent.right()
        ticks.append(sent.native.tick)

    node.run(work)
    assert ticks == [rounds] * 3


@pytest.mark.parametrize("seed", range(10))
def test_one_after_the_other_with_late_ranks(seed: int) -> None:
    """Without a wait between them, by ranks that nap, and that give up waiting after a moment and go on in steps; the
    rooms and the halves are used again while others may still read."""
    size = 2 + seed % 3
    node, draw = SharedNode(size), random.Random(seed)
    rounds = []
    for _ in range(40):
        longest = draw.choice((1, 1000, 60_000, 200_000, 500_000, 3_000_000))
        rounds.append([[draw.choice((0, 1, longest // size)) for _ in range(size)] for _ in range(size)])

    def work(rank: int) -> None:
        own_draw = random.Random(100 * seed + rank)
        for index, sizes in enumerate(rounds):
            sent = Sent(node, rank, sizes, index, whole=index % 2 == 0, blind=own_draw.random() < 0.3)
            if own_draw.random() < 0.15:
                time.sleep(own_draw.choice((1e-4, 2e-3)))
            if own_draw.random() < 0.1:
                node.mapped[rank].drop((rank + 1) % size, 0)
            end = sent.call(index, own_draw.choice((0.0, 50.0, PATIENCE_US)))
            if end != sent.native.DONE:
                sent.go_on(end)
            sent.right()

    node.run(work)


@pytest.mark.parametrize("size_bytes", [8, 100_000])
def test_sizes_that_do_not_agree(size_bytes: int) -> None:
    """All ranks see it, and nothing is moved."""
    node = SharedNode(3)
    sizes = [[size_bytes] * 3] * 3

    def work(rank: int) -> None:
        sent = Sent(node, rank, sizes)
        if rank == 1:
            sent.native = sent.made(adjoining(sizes[rank]), [size_bytes, size_bytes, size_bytes + 1])
        assert sent.call(0) == sent.native.ANNOUNCED
        assert not sent.native.sizes_agree()
        assert all((out == 0xEE).all() for out in sent.outs)

    node.run(work)


def test_misuse_is_refused() -> None:
    node = SharedNode(2)
    sent = Sent(node, 0, [[10, 10], [10, 10]])
    with pytest.raises(ValueError, match="one range per rank"):
        sent.made([Range(0, 1)], [1, 1])
    with pytest.raises(ValueError, match="outside of the stream"):
        sent.made([Range(0, 10), Range(10, 21)], [1, 1])
    with pytest.raises(ValueError, match="outside of the stream"):
        sent.made([Range(3, 2), Range(0, 0)], [1, 1])
    large = Sent(node, 0, [[100_000, 0], [0, 0]])
    assert large.native.needs_staging and not sent.native.needs_staging
    node.mapped[0].drop(0, 0)
    with pytest.raises(RuntimeError, match="no staging area"):
        large.call(0, 0.0)
