"""Two ranks of a node swap the memory in which they show their numbers: each writes where it has read."""

from __future__ import annotations

import random
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from bits import needs_native
from closed_form import numbers
from node_threads import PATIENCE_US, SharedNode
from torch import Tensor

from commlab.chunks import split
from commlab.native.dtypes import MOVED, OP_CODES
from commlab.window.delivery import addresses

pytestmark = needs_native

DONE, LATE = 0, 1
"""What ``allreduce_inline`` returns."""


@pytest.mark.parametrize("size", [1, 2, 3])
def test_whose_page_holds_the_numbers(size: int) -> None:
    """Two ranks' own and the other one's, for two operations each; else everyone's own. Never is anything written that
    was shown in the operation before."""
    node = SharedNode(size)
    held: list[list[int]] = []
    for operation in range(8):
        for rank, sync in enumerate(node.syncs):
            mine = torch.tensor([operation, rank], dtype=torch.int32)
            sync.publish(operation, 2**64 - 1, 0, mine.data_ptr(), mine.nbytes)
        held.append([node.syncs[0].inline_address(rank) for rank in range(size)])
        for sync in node.syncs:
            shown = [torch.frombuffer(bytearray(each), dtype=torch.int32).tolist() for each in sync.inlined(8)]
            assert shown == [[operation, rank] for rank in range(size)]
    for before, after in pairwise(held):
        assert not set(before) & set(after)
    for before, after in zip(held, held[2:], strict=False):
        assert before == (after[::-1] if size == 2 else after)


class Ranked:
    """A rank's side of one operation, to be called once and gone on with."""

    def __init__(self, node: SharedNode, rank: int, index: int, kind: str, numel: int):
        self.node, self.rank, self.index, self.kind = node, rank, index, kind
        self.mine = numbers(rank + index % 7, numel, torch.int32)
        self.others = [numbers(peer + index % 7, numel, torch.int32) for peer in range(2)]
        self.outs = [torch.empty(numel // 2, dtype=torch.int32) for _ in range(2)]
        self.into = addresses([out.view(torch.uint8) for out in self.outs])
        dtype, op = MOVED[torch.int32][0], OP_CODES["sum"]
        native, here = node.native, (node.syncs[rank], node.mapped[rank])
        if kind == "blocks and rooms":
            chunks = [tuple(chunk) for chunk in split(numel, 2)]
            self.native: Any = native.NodeCollective(*here, dtype, dtype, op, 1, True, True, chunks, 4 * numel <= 2**19)
        elif kind == "delivery":
            half = self.mine.nbytes // 2
            ranges = [(0, half), (half, 2 * half)]
            self.native = native.NodeDelivery(*here, addresses([self.mine.view(torch.uint8)]), ranges, [half, half])

    def call(self, patience_us: float) -> int:
        sync, address = self.node.syncs[self.rank], self.mine.data_ptr()
        if self.kind == "page":
            dtype, op = MOVED[torch.int32][0], OP_CODES["sum"]
            end: int = sync.allreduce_inline(7, self.index, address, self.mine.numel(), dtype, op, 1, patience_us)
        elif self.kind == "delivery":
            end = self.native.call(
                7, self.index, 0, addresses([out.view(torch.uint8) for out in self.outs]), patience_us
            )
        else:
            end = self.native.call(7, self.index, address, 0, patience_us)
        return end

    def go_on(self, end: int) -> None:
        sync = self.node.syncs[self.rank]
        if self.kind == "page":
            if end == LATE:
                assert sync.wait(PATIENCE_US) == -1 and sync.agreed()
                time.sleep(1e-4)  # the other one has gone on, and shows its next numbers
                published = self.mine.clone()
                self.mine.zero_()  # what was published counts
                sync.reduce_inline(self.mine.data_ptr(), published.numel(), MOVED[torch.int32][0], OP_CODES["sum"], 1)
            return
        if end == self.native.ANNOUNCED:
            assert sync.wait(PATIENCE_US) == -1 and sync.agreed()
            time.sleep(1e-4)
            if self.kind == "delivery":
                self.native.move(self.into)
            else:
                self.native.move(self.mine.data_ptr(), 0, MOVED[torch.int32][0], False)
        if end in (self.native.ANNOUNCED, self.native.UNDER_WAY):
            assert self.native.run(PATIENCE_US) == -1

    def right(self) -> bool:
        if self.kind != "delivery":
            return torch.equal(self.mine, self.others[0] + self.others[1])
        want: list[Tensor] = [other.chunk(2)[self.rank] for other in self.others]
        return all(torch.equal(*pair) for pair in zip(self.outs, want, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_one_after_the_other_in_every_way(seed: int) -> None:
    """Pages, rooms, blocks and deliveries, by ranks that nap, give up waiting and go on while the other one is at the
    next operation."""
    node, draw = SharedNode(2), random.Random(seed)
    calls = [
        (draw.choice(("page", "blocks and rooms", "delivery")), draw.choice((2, 1000, 16_000, 60_000, 400_000)))
        for _ in range(120)
    ]

    def work(rank: int) -> None:
        own_draw = random.Random(100 * seed + rank)
        for index, (kind, numel) in enumerate(calls):
            each = Ranked(node, rank, index, kind, min(numel, 16_000) if kind == "page" else numel)
            if own_draw.random() < 0.2:
                time.sleep(own_draw.choice((1e-4, 1e-3)))
            each.go_on(each.call(own_draw.choice((0.0, 50.0, PATIENCE_US))))
            assert each.right(), (index, kind, numel)

    node.run(work)
