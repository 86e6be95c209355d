"""Interleaving, warm-up, repeats, the missing and the wrong. No timing decides a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.core import harness
from bench.core.harness import Block, Contestant, ContestantMissing, measure, missing
from bench.core.ranks import Ranks


class Log:
    """Contestants that write down what happens to them."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def note(self, event: str) -> Callable[[], None]:
        return lambda: self.events.append(event)

    def contestant(self, name: str, run_s: float = 2 * harness.MIN_SAMPLE_S, wrong: int = 0) -> Contestant:
        def work() -> str:
            self.events.append(f"run {name}")
            Clock.now_s += run_s
            return name

        def check(value: Any) -> int:
            assert value == name
            return wrong

        return Contestant(name, work, self.note(f"fill {name}"), check, {"kind": "peer"})


class Clock:
    """Time that passes only in contestants."""

    now_s = 0.0


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setattr(harness.time, "perf_counter", lambda: Clock.now_s)
    monkeypatch.setattr(harness.time, "process_time", lambda: 3 * Clock.now_s)
    return Log()


def test_rounds_interleave_in_changing_order(log: Log) -> None:
    blocks = [Block([log.contestant(name)]) for name in "abcde"]
    results = measure(blocks, Ranks(), rounds=12, seed=3)
    runs = [event[-1] for event in log.events if event.startswith("run")][2 * 5 :]  # two each to warm up
    rounds = ["".join(runs[at : at + 5]) for at in range(0, len(runs), 5)]
    assert len(rounds) == 12 and all(sorted(each) == list("abcde") for each in rounds)
    assert len(set(rounds)) > 8, "a fixed order would let one contestant always follow the same other"
    assert [result.contestant.name for result in results] == list("abcde")
    assert all(result.samples_s == pytest.approx([2 * harness.MIN_SAMPLE_S] * 12) for result in results)
    assert log.events.index("fill a") < log.events.index("run a")


def test_short_runs_are_repeated(log: Log) -> None:
    short = log.contestant("s", run_s=harness.MIN_SAMPLE_S / 39.5)
    result = measure([Block([short])], Ranks(), rounds=3)[0]
    assert result.repeats == 40 and result.samples_s == pytest.approx([harness.MIN_SAMPLE_S / 39.5] * 3)
    assert result.cpu_s == pytest.approx([3 * harness.MIN_SAMPLE_S / 39.5] * 3)
    # The checked run of a sample is one of its own, on fresh input.
    assert log.events[-2:] == ["fill s", "run s"] and log.events[-43:-2] == ["fill s", *["run s"] * 40]


def test_wrong_results_are_counted(log: Log) -> None:
    good, bad = measure([Block([log.contestant("g")]), Block([log.contestant("b", wrong=7)])], Ranks(), rounds=4)
    assert (good.wrong, bad.wrong) == (0, 28)


def test_who_disturbs_is_up_only_while_measured(log: Log) -> None:
    noisy = Block([log.contestant("x"), log.contestant("y")], log.note("up"), log.note("down"), disturbs=True)
    measure([noisy, Block([log.contestant("q")])], Ranks(), rounds=5)
    up = False
    for event in log.events:
        if event in ("up", "down"):
            assert up != (event == "up")
            up = event == "up"
        else:
            assert up == (event[-1] in "xy")
    assert log.events.count("up") == 6
    at = len(log.events) - 1 - log.events[::-1].index("up")
    assert log.events[at + 1 : at + 5] == ["fill x", "run x", "fill x", "run x"], "warmed up, then timed"


def test_the_missing_say_why(log: Log) -> None:
    def refuse() -> None:
        raise ContestantMissing("cannot do that")

    unable = Contestant("unable", refuse, lambda: None, lambda _: 0, {"kind": "peer"})
    blocks = [missing("absent", "not installed", kind="peer"), Block([unable]), Block([log.contestant("here")])]
    absent, cannot, here = measure(blocks, Ranks(), rounds=3)
    assert (absent.missing, cannot.missing, here.missing) == ("not installed", "cannot do that", "")
    assert not absent.samples_s and not cannot.samples_s and len(here.samples_s) == 3


def test_an_error_is_not_a_missing_peer(log: Log) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure([Block([Contestant("b", fail, lambda: None, lambda _: 0, {})])], Ranks(), rounds=1)
