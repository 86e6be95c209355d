"""Every operation of bench.allreduce on all ranks of the launch: all give the closed form, and errors are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import commlab
from bench import accuracy
from bench.contestants import PEERS
from bench.contestants import commlab as ours
from bench.contestants.case import OPS, Case
from bench.core.harness import Block, Contestant, Unavailable, measure, missing
from bench.core.ranks import Ranks
from bench.rows import rows

ALONE = "torch's default process group stays, and Horovod's thread"


@pytest.fixture(scope="module")
def everyone() -> Ranks:
    return Ranks()


@pytest.mark.parametrize("op", OPS)
def test_all_contestants_are_right(ranks: Any, everyone: Ranks, op: str) -> None:
    case = Case(op, 1003, torch.float32, everyone.rank, everyone.size)
    world = ranks.world
    messages = world.subgroup(range(world.size))
    memory = None if world.window is None else commlab.empty(case.bytes, torch.int8)
    blocks = ours.blocks(case, ours.Groups(world, messages, memory), ours.NAMES, [None, "fp16"], [True, False])
    for peer in PEERS.values():
        blocks += peer(case)
    results = measure(blocks, everyone, rounds=2, timeout_s=60)
    found = {row["contestant"]: row for row in rows(results, case)}
    assert all(row["wrong"] == 0 for row in found.values() if "missing" not in row), found
    names = {name for name, row in found.items() if "missing" not in row}
    assert {"commlab ring", "commlab tree", "commlab halving", "commlab direct", "commlab ring, no check"} <= names
    assert any(name.startswith("MPI_") for name in names) and "gloo" in names
    assert (op == "allreduce") == ("commlab ring, wire fp16" in names)
    assert messages is not None and messages.agreement.required and world.agreement.required, "the check is on again"


@pytest.mark.parametrize("wire", ["fp16", "bf16"])
def test_who_rounds_once_is_nearest_to_float64(ranks: Any, everyone: Ranks, wire: str) -> None:
    world = ranks.world
    groups = ours.Groups(world, world.subgroup(range(world.size)), None)
    rows = {
        row["contestant"]: row
        for row in (accuracy.compared(way, everyone, wire, 5003) for way in accuracy.ways(groups, wire))
    }
    # Each contribution is rounded, and the mean: variances of one rounding each, of the mean's own size and of 1/P's.
    assert 1.2 < rows["commlab direct"]["error_over_one_rounding"] < 1.6
    # They add in another order, in fp32.
    direct = rows["commlab direct"]["relative_error"]
    assert rows["commlab window"]["relative_error"] == pytest.approx(direct, rel=1e-2)
    for name in ("commlab ring", "commlab halving", "commlab tree", "gloo, as in DDP's compress hook"):
        assert rows[name]["relative_error"] > 1.2 * direct, name
    ulp = 2.0**-10 if wire == "fp16" else 2.0**-7
    for row in rows.values():
        if row["kind"] == "commlab":
            assert abs(row["mean_of_60000s"] / 60_000 - 1) <= everyone.size * ulp
    assert "commlab direct" in accuracy.rendered(list(rows.values()))


def test_one_wrong_rank_is_enough(ranks: Any, everyone: Ranks) -> None:
    """A number that is wrong on the last rank only, a reason that only rank 0 knows: every rank hears of both."""
    last = everyone.rank == everyone.size - 1
    wrong = Contestant("wrong", lambda: None, lambda: None, lambda _: 3 if last else 0, {"kind": "peer"})

    def refuse() -> None:
        if everyone.rank == 0:
            raise Unavailable("not on rank 0")

    unable = Contestant("unable", refuse, lambda: None, lambda _: 0, {"kind": "peer"})
    blocks = [Block([wrong]), Block([unable]), missing("absent", "nowhere", kind="peer")]
    results = measure(blocks, everyone, rounds=4)
    assert [result.wrong for result in results] == [12, 0, 0]
    assert [result.missing for result in results] == ["", "not on rank 0", "nowhere"]


def test_a_sample_is_the_slowest_rank(ranks: Any, everyone: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is made up: rank r takes r + 1 seconds."""
    from bench.core import harness

    clock = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def run() -> None:
        clock[0] += everyone.rank + 1

    contestant = Contestant("c", run, lambda: None, lambda _: 0, {"kind": "peer"})
    (result,) = measure([Block([contestant])], everyone, rounds=3)
    assert result.samples_s == [float(everyone.size)] * 3
