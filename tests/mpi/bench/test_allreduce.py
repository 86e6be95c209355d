"""Every operation of bench.allreduce and bench.accuracy on all ranks of the launch: all give the closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import commlab
from bench import accuracy, allreduce
from bench.contestants import PEERS
from bench.contestants.case import OPS, Case
from bench.contestants.commlab import NAMES, Groups, commlab_blocks
from bench.core.harness import measure
from bench.core.ranks import Ranks

LEAVES = "torch's default process group, and Horovod's thread"


@pytest.fixture(scope="module")
def everyone() -> Ranks:
    return Ranks()


@pytest.mark.parametrize("op", OPS)
def test_all_contestants_are_right(ranks: Any, everyone: Ranks, op: str) -> None:
    case = Case(op, 1003, torch.float32, everyone.rank, everyone.size)
    world = ranks.world
    messages = world.subgroup(range(world.size))
    memory = None if world.window is None else commlab.empty(case.bytes, torch.int8)
    blocks = commlab_blocks(case, Groups(world, messages, memory), NAMES, [None, "fp16"], [True, False])
    for peer in PEERS.values():
        blocks += peer(case)
    results = measure(blocks, everyone, rounds=2, timeout_s=60)
    found = {record["contestant"]: record for record in allreduce.records(results, case)}
    assert all(record["wrong"] == 0 for record in found.values() if "missing" not in record), found
    names = {name for name, record in found.items() if "missing" not in record}
    assert {"commlab ring", "commlab tree", "commlab halving", "commlab direct", "commlab ring, no check"} <= names
    assert any(name.startswith("MPI_") for name in names) and "gloo" in names
    assert (op == "allreduce") == ("commlab ring, wire fp16" in names)
    assert messages is not None and messages.agreement.required and world.agreement.required, "the check is on again"


@pytest.mark.parametrize("wire", ["fp16", "bf16"])
def test_who_rounds_once_is_nearest_to_float64(ranks: Any, everyone: Ranks, wire: str) -> None:
    world = ranks.world
    groups = Groups(world, world.subgroup(range(world.size)), None)
    records = {
        record["contestant"]: record
        for record in (accuracy.compared(way, everyone, wire, 5003) for way in accuracy.ways(groups, wire))
    }
    # Each contribution is rounded, and the mean: variances of one rounding each, of the mean's own size and of 1/P's.
    assert 1.2 < records["commlab direct"]["error_over_one_rounding"] < 1.6
    # They add in another order, in fp32.
    direct = records["commlab direct"]["relative_error"]
    assert records["commlab window"]["relative_error"] == pytest.approx(direct, rel=1e-2)
    for name in ("commlab ring", "commlab halving", "commlab tree", "gloo, as in DDP's compress hook"):
        assert records[name]["relative_error"] > 1.2 * direct, name
    ulp = 2.0**-10 if wire == "fp16" else 2.0**-7
    for record in records.values():
        if record["kind"] == "commlab":
            assert abs(record["mean_of_60000s"] / 60_000 - 1) <= everyone.size * ulp
    assert "commlab direct" in accuracy.rendered(list(records.values()))
