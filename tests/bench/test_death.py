"""bench.death: what it makes of kills, and one kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import death
from commlab.transport.tcp import missing_reason


def test_a_record_counts_what_was_late_and_who_was_not_named() -> None:
    options = death.PROGRAM.parser().parse_args(["--ranks", "4"])
    words = "rank 1 was killed: rank 0: lost rank 2"
    kills = [death.Kill(float(ms), 3, (), 1.0 + ms) for ms in (4, 2, 1, 3)] + [death.Kill(50.5, 2, (words,), 0.5)]
    record = death.record("keeper", kills, options)
    assert (record["p50_ms"], record["p90_ms"], record["most_ms"]) == (3.0, 50.5, 50.5)
    assert (record["within_goal"], record["named"], record["wrong"]) == (4, 14, 1)
    assert record["misnamed"] == [words]
    assert record["samples_ms"] == [4.0, 2.0, 1.0, 3.0, 50.5]
    assert death.cells(record)[-3:] == ["4 of 5", "14 of 15", "0.5 to 5.0"]


@pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())
def test_a_kill_is_named(tmp_path: Path) -> None:
    """Kind: kill -9 of one rank through commlab itself. All others name it; how fast decides nothing."""
    written = tmp_path / "death.jsonl"
    arguments = ["--ranks", "3", "--rounds", "1", "--size", "4MB", "--memory", "8MB", "--json"]
    assert death.main([*arguments, str(written)]) == 0
    _, row = map(json.loads, written.read_text().splitlines())
    assert row["named"] == 2 and row["kills"] == 1
