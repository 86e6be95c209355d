"""The harness on all ranks of the launch: errors of one rank are heard by all, and the slowest rank counts."""

from __future__ import annotations

from typing import Any

import pytest

from bench.core.harness import Block, Contestant, ContestantMissing, measure, missing
from bench.core.ranks import Ranks


@pytest.fixture(scope="module")
def everyone() -> Ranks:
    return Ranks()


def test_one_wrong_rank_is_enough(ranks: Any, everyone: Ranks) -> None:
    """A number that is wrong on the last rank only, a reason that only rank 0 knows: every rank hears of both."""
    last = everyone.rank == everyone.size - 1
    wrong = Contestant("wrong", lambda: None, lambda: None, lambda _: 3 if last else 0, {"kind": "peer"})

    def refuse() -> None:
        if everyone.rank == 0:
            raise ContestantMissing("not on rank 0")

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

    def work() -> None:
        clock[0] += everyone.rank + 1

    contestant = Contestant("c", work, lambda: None, lambda _: 0, {"kind": "peer"})
    (result,) = measure([Block([contestant])], everyone, rounds=3)
    assert result.samples_s == [float(everyone.size)] * 3
