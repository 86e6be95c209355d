"""``bench.fuzz``: launches, and the record of what came out."""

from __future__ import annotations

from typing import Any

import pytest

from bench import fuzz
from bench.fuzz import LaunchOutcome
from bench.training.jobs import Launcher
from bench.training.programs import draw


def test_a_program_that_fails_is_named_and_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch goes on at the seed after the failed one, until the time is over."""
    starts: list[int] = []

    def launch(
        launcher: Any, ranks: int, seed: int, seconds: float, programs: int | None
    ) -> tuple[LaunchOutcome, float]:
        starts.append(seed)
        drawn = [draw(each, ranks).record() for each in range(seed, seed + 4)]
        return (
            LaunchOutcome(drawn[:3], drawn[3], "what ranks said") if len(starts) < 3 else LaunchOutcome(drawn, None, "")
        ), 4.0

    monkeypatch.setattr(fuzz, "launch", launch)
    record, failures = fuzz._record(2, fuzz.outcomes(Launcher(None, 10.0), 2, 100, None), 100)
    assert starts == [100, 104, 108]
    assert record["programs"] == 10 and record["failed_seeds"] == [103, 107] and record["wrong"] == 2
    assert (record["first_seed"], record["last_seed"]) == (100, 111)
    assert sum(record["strategies"].values()) >= 10
    assert "what ranks said" in failures[0][1] and "seed 103" in fuzz.described(failures[0][0])
    assert "103, 107" in fuzz.cells(record)[-1]


def test_a_launch_that_ends_before_its_first_program_ends_the_search() -> None:
    """Without a program there is no seed to go on from."""

    class Broken(Launcher):
        def command(self, ranks: int, python: Any) -> list[str]:
            return ["false"]

    found = list(fuzz.outcomes(Broken(None, 10.0), 1, 3, 1))
    assert len(found) == 1 and found[0].failed == {"seed": 3, "steps": []}


def test_one_rank_runs_programs() -> None:
    """The whole way, with a launch of its own; one rank needs no MPI."""
    [outcome] = fuzz.outcomes(Launcher(None, 60.0), 1, 40, 3)
    assert outcome.failed is None, outcome.output
    assert [program["seed"] for program in outcome.programs] == [40, 41, 42]
