"""Interleaving, warm-up, repeats, the missing and the wrong; rows and tables made of it. No timing decides a test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.contestants import PEERS
from bench.contestants.case import Case
from bench.core import harness, table
from bench.core.harness import Block, Contestant, Unavailable, measure, missing
from bench.core.ranks import Ranks
from bench.rows import rows


class Log:
    """Contestants that write down what happens to them."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def note(self, event: str) -> Callable[[], None]:
        return lambda: self.events.append(event)

    def contestant(self, name: str, run_s: float = 2 * harness.MIN_SAMPLE_S, wrong: int = 0) -> Contestant:
        def run() -> str:
            self.events.append(f"run {name}")
            Clock.now_s += run_s
            return name

        def check(value: Any) -> int:
            assert value == name
            return wrong

        return Contestant(name, run, self.note(f"fill {name}"), check, {"kind": "peer"})


class Clock:
    """Time that passes only in contestants."""

    now_s = 0.0


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setattr(harness.time, "perf_counter", lambda: Clock.now_s)
    return Log()


def test_rounds_interleave_in_changing_order(log: Log) -> None:
    blocks = [Block([log.contestant(name)]) for name in "abcde"]
    results = measure(blocks, Ranks(), rounds=12, seed=3)
    runs = [event[-1] for event in log.events if event.startswith("run")][2 * 5 :]  # two each to warm up
    turns = ["".join(runs[at : at + 5]) for at in range(0, len(runs), 5)]
    assert len(turns) == 12 and all(sorted(turn) == list("abcde") for turn in turns)
    assert len(set(turns)) > 8, "a fixed order would let one contestant always follow the same other"
    assert [result.contestant.name for result in results] == list("abcde")
    assert all(result.samples_s == pytest.approx([2 * harness.MIN_SAMPLE_S] * 12) for result in results)
    assert log.events.index("fill a") < log.events.index("run a")


def test_short_runs_are_repeated(log: Log) -> None:
    short = log.contestant("s", run_s=harness.MIN_SAMPLE_S / 39.5)
    result = measure([Block([short])], Ranks(), rounds=3)[0]
    assert result.repeats == 40 and result.samples_s == pytest.approx([harness.MIN_SAMPLE_S / 39.5] * 3)
    # The checked run of a sample is one of its own, on fresh input.
    assert log.events[-2:] == ["fill s", "run s"] and log.events[-43:-2] == ["fill s", *["run s"] * 40]


def test_wrong_results_are_counted(log: Log) -> None:
    good, bad = measure([Block([log.contestant("g")]), Block([log.contestant("b", wrong=7)])], Ranks(), rounds=4)
    assert (good.wrong, bad.wrong) == (0, 28)


def test_who_disturbs_is_up_only_in_its_turns(log: Log) -> None:
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
        raise Unavailable("cannot do that")

    unable = Contestant("unable", refuse, lambda: None, lambda _: 0, {"kind": "peer"})
    blocks = [missing("absent", "not installed", kind="peer"), Block([unable]), Block([log.contestant("here")])]
    absent, cannot, here = measure(blocks, Ranks(), rounds=3)
    assert (absent.missing, cannot.missing, here.missing) == ("not installed", "cannot do that", "")
    assert not absent.samples_s and not cannot.samples_s and len(here.samples_s) == 3
    found = rows([absent, cannot, here], Case("allreduce", 8, torch.float32, 0, 2))
    assert [row.get("missing") for row in found] == ["not installed", "cannot do that", None]


def test_an_error_is_not_a_missing_peer(log: Log) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure([Block([Contestant("b", fail, lambda: None, lambda _: 0, {})])], Ranks(), rounds=1)


def test_peers_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    case = Case("allreduce", 8, torch.float32, 0, 1)
    assert "make horovod" in measure(PEERS["horovod"](case), Ranks(), 1)[0].missing
    assert "mpirun" in measure(PEERS["mpi"](case), Ranks(), 1)[0].missing
    other = Case("allgather", 8, torch.float32, 0, 1)
    assert "allreduce only" in measure(PEERS["horovod"](other), Ranks(), 1)[0].missing


def test_rows_hold_the_best_peer_and_the_check(log: Log) -> None:
    def result(name: str, samples_s: list[float], **labels: Any) -> harness.Result:
        contestant = Contestant(name, lambda: None, lambda: None, lambda _: 0, labels)
        return harness.Result(contestant, samples_s)

    ours = {"kind": "commlab", "algorithm": "ring", "wire": None}
    results = [
        result("slow copy", [2.0, 2.0, 2.0], kind="floor"),
        result("copy", [1.0, 2.0, 1.0], kind="floor"),
        result("ring", [4.0, 8.0, 4.4], check=True, **ours),
        result("ring, no check", [3.0, 7.0, 4.0], check=False, **ours),
        result("half ring", [4.0, 4.0, 4.0], kind="commlab", algorithm="ring", wire="fp16", check=True),
        result("peer", [8.0, 16.0, 4.0], kind="peer"),
        result("half peer", [2.0, 2.0, 2.0], kind="peer", wire="fp16"),
        result("wrong peer", [1.0, 1.0, 1.0], kind="peer"),
    ]
    results[-1].wrong = 1
    found = {row["contestant"]: row for row in rows(results, Case("allreduce", 1000, torch.float32, 0, 4))}
    assert found["ring"]["ratio_floor"] == [4.0, 4.0, 4.4] and found["ring"]["floor"] == "copy"
    assert found["ring"]["best_peer"] == "peer", (
        "not the one whose result is wrong, nor the one that sends half the bytes"
    )
    assert found["ring"]["ratio_best_peer"] == [0.5, 0.5, 1.1]
    assert found["half ring"]["best_peer"] == "half peer" and found["half ring"]["ratio_best_peer"][0] == 2
    assert found["ring"]["check_us"] == 1e6 and "check_us" not in found["half ring"]
    assert found["ring"]["algbw_GBps"] == pytest.approx(4000 / 4.4 / 1e9, rel=1e-3)
    assert found["ring"]["busbw_GBps"] == pytest.approx(1.5 * 4000 / 4.4 / 1e9, rel=1e-3)
    assert "busbw_GBps" not in found["copy"]


def test_table() -> None:
    text = table.render(("name", "us"), [("ring", "5"), ("a long name", "1234"), [], ["gloo: missing"]])
    assert text == "name           us\n-----------  ----\nring            5\na long name  1234\n\ngloo: missing"
