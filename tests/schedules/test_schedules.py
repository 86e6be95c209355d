"""Every algorithm as every operation on 1..17 simulated ranks: exact, and with the messages that its page promises."""

from __future__ import annotations

from math import ceil, log2

import pytest
import schedule_checks
import torch
from schedule_checks import SEGMENTS, SIZES
from simulated import rounds

from commlab.collectives.select import TABLE, Conditions, choose
from commlab.errors import UsageError
from commlab.schedules import ALGORITHMS, compose
from commlab.schedules.step import AnyStep, Schedule, Step, elements_sent, messages_sent

algorithms = pytest.mark.parametrize("name", ALGORITHMS)
segments = pytest.mark.parametrize("segment_bytes", SEGMENTS, ids=["whole", "segmented"])


@algorithms
@segments
@pytest.mark.parametrize("op", schedule_checks.OPS)
def test_allreduce(name: str, segment_bytes: int | None, op: str) -> None:
    schedule_checks.check_allreduce(name, segment_bytes, op)


@algorithms
@segments
@pytest.mark.parametrize("dtype", schedule_checks.DTYPES, ids=str)
def test_reduce_scatter_and_allgather(name: str, segment_bytes: int | None, dtype: torch.dtype) -> None:
    schedule_checks.check_reduce_scatter_and_allgather(name, segment_bytes, dtype)


@algorithms
@pytest.mark.parametrize(("numel", "segment_bytes"), schedule_checks.ROOTED)
def test_reduce_and_broadcast_with_every_root(name: str, numel: int, segment_bytes: int | None) -> None:
    schedule_checks.check_reduce_and_broadcast(name, numel, segment_bytes)


@algorithms
def test_the_network_carries_what_the_schedule_says(name: str) -> None:
    schedule_checks.check_what_the_network_carries(name)


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
    schedule_checks.check_owners(name)


@algorithms
def test_one_rank_and_nothing_to_send_need_no_step(name: str) -> None:
    schedule_checks.check_nothing_to_send(name)


def test_select() -> None:
    """The table has a row for every case, its names exist, and others are refused with a list of those that do."""
    for kind in ("allreduce", "reduce_scatter", "allgather", "reduce", "broadcast"):
        for size in SIZES:
            for numbytes in (0, 4, 1 << 14, 1 << 20, 1 << 30):
                for half in (False, True):
                    name, reason = choose("auto", Conditions(kind, size, numbytes, half, "mpi"), tuple(ALGORITHMS))
                    assert name in ALGORITHMS
                    assert reason
    assert choose("auto", Conditions("allreduce", 8, 1 << 20, True, "mpi"), ())[0] == "direct"
    assert all(row.reason for row in TABLE)
    for kind, wanted in (
        ("allreduce", "direct"),
        ("reduce_scatter", "direct"),
        ("reduce", "ring"),
        ("broadcast", "ring"),
    ):
        # One rank would take in (P - 1) n over its link.
        assert choose("auto", Conditions(kind, 4, 1 << 19, True, "mpi", nodes=4), tuple(ALGORITHMS))[0] == wanted
    assert choose("tree", Conditions("allreduce", 8, 1 << 30, True, "mpi"), tuple(ALGORITHMS))[0] == "tree"
    with pytest.raises(UsageError, match=r"'rnig'.*ring, halving, tree, direct"):
        choose("rnig", Conditions("allreduce", 8, 4, False, "mpi"), tuple(ALGORITHMS))
