"""Ranks about to do different things all hear of it, both sides named, before anything is reduced; and can go on."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from closed_form import expected, numbers
from mpi_ranks import Ranks

import commlab
from commlab.chunks import split
from commlab.collectives.halves import gather_chunks_async
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group

pytestmark = pytest.mark.mpi(min_size=2)

Call = Callable[[Group, torch.Tensor], object]

# What most ranks do, what one does instead, and what the message must say of the two sides.
CASES: dict[str, tuple[Call, Call, str, str]] = {
    "shape": (
        lambda group, x: commlab.allreduce(x.view(2, 3), "sum", group=group),
        lambda group, x: commlab.allreduce(x.view(3, 2), "sum", group=group),
        r"allreduce #\d+ of float32\[2, 3\]",
        r"allreduce #\d+ of float32\[3, 2\]",
    ),
    "count": (
        lambda group, x: commlab.allreduce(x, group=group),
        lambda group, x: commlab.allreduce(x[:5], group=group),
        r"of float32\[6\]",
        r"of float32\[5\]",
    ),
    "nothing": (
        lambda group, x: commlab.allreduce(x, group=group),
        lambda group, x: commlab.allreduce(x[:0], group=group),
        r"of float32\[6\]",
        r"of float32\[0\]",
    ),
    "dtype": (
        lambda group, x: commlab.allreduce(x, "sum", "grad", group=group),
        lambda group, x: commlab.allreduce(x.double(), "sum", "grad", group=group),
        r"'grad' of float32",
        r"'grad' of float64",
    ),
    "op": (
        lambda group, x: commlab.allreduce(x, "max", algorithm="ring", group=group),
        lambda group, x: commlab.allreduce(x, "min", algorithm="ring", group=group),
        r"\(max, ring, wire as is\)",
        r"\(min, ring, wire as is\)",
    ),
    "name": (
        lambda group, x: commlab.allreduce(x, name="weight", group=group),
        lambda group, x: commlab.allreduce(x, name="bias", group=group),
        r"allreduce #\d+ 'weight' of",
        r"allreduce #\d+ 'bias' of",
    ),
    "algorithm": (
        lambda group, x: commlab.allreduce(x, algorithm="ring", group=group),
        lambda group, x: commlab.allreduce(x, algorithm="tree", group=group),
        r"\(mean, ring,",
        r"\(mean, tree,",
    ),
    "wire": (
        lambda group, x: commlab.allreduce(x, algorithm="ring", group=group),
        lambda group, x: commlab.allreduce(x, algorithm="ring", wire="bf16", group=group),
        r"wire as is",
        r"wire bf16",
    ),
    "operation": (
        lambda group, x: commlab.allreduce(x, group=group),
        lambda group, x: commlab.barrier(group=group),
        r"allreduce #\d+ of float32\[6\]",
        r"barrier #\d+",
    ),
    "root": (
        lambda group, x: commlab.broadcast(x, root=0, group=group),
        lambda group, x: commlab.broadcast(x, root=1, group=group),
        r"chunks to \[6, 6",
        r"chunks to \[0, 6",
    ),
    "chunks": (
        lambda group, x: gather_chunks_async(x, split(6, group.size), group=group).wait(),
        lambda group, x: gather_chunks_async(x, split(6, group.size, align=4), group=group).wait(),
        r"chunks to \[[^4]",
        r"chunks to \[4",
    ),
    "group": (
        lambda group, x: group.subgroup([0, 1]),
        lambda group, x: group.subgroup([1, 0]),
        r"subgroup #\d+ \(ranks 0, 1\)",
        r"subgroup #\d+ \(ranks 1, 0\)",
    ),
    "report": (
        lambda group, x: gather_bytes(group, b"", "trace"),
        lambda group, x: gather_bytes(group, b"", "loss"),
        r"exchange #\d+ 'length of trace'",
        r"exchange #\d+ 'length of loss'",
    ),
}


def groups_of(ranks: Ranks) -> list[Group]:
    """All ranks, whose check is in the window if they share one; and halves, which send messages."""
    return [ranks.world, ranks.halves(ranks.size // 2)] if ranks.size >= 4 else [ranks.world]


@pytest.mark.parametrize("case", CASES)
def test_disagreement(ranks: Ranks, case: str) -> None:
    usual, odd, usual_words, odd_words = CASES[case]
    for group in groups_of(ranks):
        for outsider in {0, group.size - 1}:
            mine = numbers(group.rank, 6, torch.float32)
            with pytest.raises(commlab.DisagreementError) as caught:
                (odd if group.rank == outsider else usual)(group, mine)
            others = "ranks? " + (f"1-{group.size - 1}" if outsider == 0 else f"0-{outsider - 1}")
            if group.size == 2:
                others = f"rank {1 - outsider}"
            message = str(caught.value)
            assert message.startswith(f"ranks disagree (seen on rank {group.rank}): ")
            assert re.search(rf"{others}: [^;]*{usual_words}", message), message
            assert re.search(rf"rank {outsider}: [^;]*{odd_words}", message), message
            assert "Nothing was reduced" in message
            assert torch.equal(mine, numbers(group.rank, 6, torch.float32)), "it was touched"

            assert torch.equal(
                commlab.allreduce(mine, "sum", group=group), expected("sum", group.size, 6, torch.float32)
            )


def test_two_named_tensors_in_swapped_order(ranks: Ranks) -> None:
    for group in groups_of(ranks):
        order = ["bias", "weight"] if group.rank == 1 else ["weight", "bias"]
        data = {name: numbers(group.rank, 10, torch.float32) for name in order}
        handles = [commlab.allreduce_async(data[name], "sum", name, group=group) for name in order]
        for handle in handles:
            with pytest.raises(commlab.DisagreementError, match=r"rank 1: allreduce #\d+ '(bias|weight)'"):
                handle.wait()
        assert all(torch.equal(each, numbers(group.rank, 10, torch.float32)) for each in data.values())


def test_all_sides_are_named(ranks: Ranks) -> None:
    """Not two sides only: every rank with a name of its own."""
    for group in groups_of(ranks):
        with pytest.raises(commlab.DisagreementError) as caught:
            commlab.allreduce(torch.zeros(3), name=f"t{group.rank}", group=group)
        for rank in range(group.size):
            assert re.search(rf"rank {rank}: allreduce #\d+ 't{rank}' of float32\[3\]", str(caught.value))


def test_the_check_can_be_switched_off(ranks: Ranks) -> None:
    """Then names are not compared, and a barrier is checked all the same."""
    group = ranks.halves(ranks.size // 2)
    group.agreement.required = False
    try:
        mine = numbers(group.rank, 10, torch.float32)
        commlab.allreduce(mine, "sum", name=f"t{group.rank}", algorithm="tree", group=group)
        assert torch.equal(mine, expected("sum", group.size, 10, torch.float32))
    finally:
        group.agreement.required = True
    group.barrier()
