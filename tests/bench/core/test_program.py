"""The common main: what is shown and written, who speaks, and the exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

import commlab
from bench.core import results
from bench.core.errors import BenchError
from bench.core.program import JobProgram, RankProgram, Section, Session, _publish, refuse
from bench.core.results import Record
from commlab.errors import UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wrong", type=int, default=0)


def measure(session: Session) -> Iterator[Section]:
    session.run["extra"] = "known late"
    yield Section("first", [{"type": "row", "wrong": session.options.wrong}])
    yield Section("second", [{"type": "row"}, {"type": "row", "missing": "gone"}])


def test_sections_are_shown_and_written_below_one_run_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.jsonl"
    program = RankProgram("bench.tried", "Usage.", arguments, measure)
    assert program.main(["--json", str(file)]) == 0
    assert capsys.readouterr().out == "first\nsecond\n"
    ((about, records),) = results.read(file)
    assert about["bench"] == "bench.tried" and about["extra"] == "known late" and len(records) == 3
    with pytest.raises(UsageError):
        commlab.allreduce(None)  # type: ignore[arg-type]  # the group is released


def test_wrong_numbers_are_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    program = RankProgram("bench.tried", None, arguments, measure, failure="sums are wrong")
    assert program.main(["--wrong", "3"]) == 1
    assert capsys.readouterr().err == "3 sums are wrong\n"


def test_one_rank_alone_is_told_how_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    program = RankProgram("bench.tried", None, arguments, measure, alone="one rank sends nothing")
    with pytest.raises(SystemExit, match="2"):
        program.main([])
    commlab.shutdown()
    assert "one rank sends nothing: start it with mpirun -n 2, or more" in capsys.readouterr().err


def test_who_does_not_speak_counts_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = [Section("text", [{"wrong": 2}]), Section("text", [{"wrong": 7}], failed=1)]
    assert _publish(sections, {}, str(tmp_path / "r.jsonl"), speaks=False) == 3
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_job_that_cannot_run_is_a_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(options: argparse.Namespace, run: Record) -> Iterator[Section]:
        yield Section("begun")
        raise (UsageError if options.wrong else BenchError)("no such thing")

    for flags in ([], ["--wrong", "1"]):
        assert JobProgram("bench.tried", None, arguments, fail).main(flags) == 2
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == ("begun\n", "bench.tried: no such thing\n")
    assert refuse("bench.tried", KeyError("type")) == 2
    assert capsys.readouterr().err == "bench.tried: KeyError('type')\n"
