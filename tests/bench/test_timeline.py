"""bench.timeline: its pictures, and its answers to what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import timeline


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
