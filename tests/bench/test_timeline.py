"""One step out of a trace: the right spans on the right rows, cut where the step begins and ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import timeline
from commlab import trace

MS = 1_000_000


def span(name: str, lane: str, start_ms: float, stop_ms: float, **args: Any) -> list[Any]:
    return [name, lane, int(start_ms * MS), int((stop_ms - start_ms) * MS), args]


def step(number: int, start_ms: float) -> list[list[Any]]:
    """Of 100 ms: forward with a wait in it, backward with a bucket packed, 30 ms of waiting, of which 10 are twice."""
    return [
        span("wait for h.0", "compute", start_ms + 5, start_ms + 10),
        span("forward", "compute", start_ms, start_ms + 20),
        span("pack bucket 0", "compute", start_ms + 40, start_ms + 41),
        span("backward", "compute", start_ms + 20.5, start_ms + 69.5),
        span("backward", "compute", start_ms + 20, start_ms + 70),
        span("exchange", "compute", start_ms + 70, start_ms + 90),
        span("pull", "compute", start_ms + 80, start_ms + 95),
        span("step", "compute", start_ms + 70, start_ms + 100),
        span(f"step {number}", "steps", start_ms, start_ms + 100, step=number),
        span("allreduce #3 'bucket 0' of float32[4] (mean)", "exchange", start_ms + 41, start_ms + 75),
        span("exchange #4 'norm'", "exchange", start_ms + 75, start_ms + 76),
        span("pull of 'h.0.weight' at clock 1", "exchange", start_ms + 92, start_ms + 108),
        span("pull of 'h.1.weight' .. 'h.1.bias' at clock 1", "exchange", start_ms + 93, start_ms + 112),
    ]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Rank 0 makes steps 0 to 2, rank 1 the same 10 ms later, and rank 2 serves."""
    one, other = ([each for at in range(3) for each in step(at, late + 100 * at)] for late in (1000, 1010))
    serves = [span("push h.1.weight of peer 0, clock 1", "server", 1150 + at, 1151 + at) for at in (0, 70)]
    about = {"command": "python -m commlab.train", "ranks": 3, "config": {"strategy": "ps", "servers": 1}}
    trace.write(tmp_path / "t.json", [json.dumps(spans).encode() for spans in (one, other, serves)], about)
    return tmp_path / "t.json"


def test_a_step_is_cut_out_on_a_clock_of_its_own(written: Path) -> None:
    _, spans = timeline.read(written)
    found = timeline.cut(spans, 1, [0])
    assert {each.name for each in found if each.lane == "steps"} == {"step 1"}
    assert min(each.start_ms for each in found) == 0 and max(each.stop_ms for each in found) == 100
    pulls = [round(ms, 6) for each in found if each.name.startswith("pull of") for ms in each[3:5]]
    assert pulls == [0, 8, 0, 12, 92, 100, 93, 100], "those of step 0 end in it"
    both = timeline.cut(spans, 1)
    assert max(each.stop_ms for each in both) == 110, "to the end of the last rank"
    assert [round(each.start_ms, 6) for each in both if each.rank == 2] == [50], "the other push was later"


def test_rows_and_kinds(written: Path) -> None:
    _, spans = timeline.read(written)
    rows = timeline.rows(timeline.cut(spans, 1))
    assert [(row.rank, row.title, row.lines) for row in rows] == [
        *((rank, *rest) for rank in (0, 1) for rest in (("computes", 1), ("gradients", 1), ("parameters", 2))),
        (2, "serves", 1),
    ]
    computes, gradients, parameters = (rows[at].bars for at in (3, 4, 5))
    # Rank 1 begins 10 ms later, so its step 0 is still seen.
    assert [bar.kind for bar in computes if bar.start_ms >= 10] == [
        *("forward", "waiting", "backward", "pack", "waiting", "waiting")
    ]
    assert [(bar.kind, bar.label) for bar in gradients if bar.start_ms >= 10] == [("gradients", "b0"), ("words", "")]
    assert [(bar.label, bar.place) for bar in parameters[-2:]] == [("h.0", 0), ("h.1 ..", 1)]
    assert [bar.kind for bar in rows[6].bars] == ["gradients"]


def test_waiting_counts_once(written: Path) -> None:
    _, spans = timeline.read(written)
    computes = timeline.rows(timeline.cut(spans, 1, [0]))[0]
    assert timeline.waited_ms(computes) == pytest.approx(5 + 25)


def test_titles() -> None:
    config = {"strategy": "dps", "model": "gpt2-tiny", "wire": "fp16", "overlap": "off", "servers": 2}
    assert timeline.title_of({"ranks": 4, "config": config}, 7, "2 hosts") == (
        "One step (7) of dps with 2 servers, wire fp16, without overlap, gpt2-tiny, 4 ranks, 2 hosts"
    )
    assert timeline.title_of({}, 0, "") == "One step (0) of ?"


def test_the_program(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    png, svg = written.with_suffix(".png"), written.with_suffix(".svg")
    where = ["--where", "2 hosts & a link", "--launcher", "mpirun -n 3"]
    assert timeline.main([str(written), "--step", "1", "--png", str(png), "--svg", str(svg), *where]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "rank 0: waits 35.0 ms of 110.0", "5 in the next step"
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    for said in ("of ps with 1 server, 3 ranks, 2 hosts &amp; a link", "mpirun -n 3 python -m commlab.train"):
        assert said in text
    for said in ("rank 2 serves", "waits 35 ms of 110", "b0", "backward"):
        assert f">{said}</text>" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "3"], "no step 3 of these ranks in this trace, which has steps 0 to 2"),
        (["--step", "1", "--ranks", "0,5"], "no rank 5 in this trace; there are 0, 1, 2"),
    ],
)
def test_what_is_not_there_is_said(
    written: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert timeline.main([str(written), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"traceEvents": [{"name": "x"}]}')
    assert timeline.main([str(tmp_path / "other.json"), "--step", "0"]) == 2
    assert "not a trace that commlab.train --trace wrote" in capsys.readouterr().err
