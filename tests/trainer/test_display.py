"""Display: a bar on a terminal, lines elsewhere, and a run that goes on when nobody reads any more."""

from __future__ import annotations

import io
import sys

import pytest

from commlab.trainer.display import Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_without_carriage_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Display in a log: a line every some seconds."""
    clock = iter([0.0, 4.0, 10.0, 19.9, 20.0, 7260.0])
    monkeypatch.setattr("commlab.trainer.display.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = Display("auto", 10)
    progress.start(100, 20)
    for done in range(21, 26):
        progress.update(done, f"loss {done}")
    progress.close()
    assert sys.stderr.getvalue() == (  # type: ignore[attr-defined]
        "step 22 of 100: loss 22; 0:10, 6:30 left\n"
        "step 24 of 100: loss 24; 0:20, 6:20 left\n"
        "step 25 of 100: loss 25; 2:01:00, 30:15:00 left\n"
    )


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert Display("auto", 10).mode == "bar"
    assert Display("lines", 10).mode == "lines"
    bar = Display("bar", 10)
    bar.start(4, 0)
    bar.update(4, "loss 1")
    bar.close()
    assert "\r" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_a_reader_that_has_left_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="ascii") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        progress = Display("none", 10)
        progress.line("one")
        progress.line("two")
    errors = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert errors.count("standard output can't be written any more") == 1


def test_any_character_on_any_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    Display("none", 10).line("naïve")
    assert stream.buffer.getvalue() == b"na\\xefve\n"  # type: ignore[attr-defined]
