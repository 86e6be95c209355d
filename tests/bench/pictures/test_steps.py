"""One step out of a trace: the right spans on the right tracks, cut where the step begins and ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.pictures.steps import cut, read, title_of, tracks, waited_ms


def test_a_step_is_cut_out_on_a_clock_of_its_own(written: Path) -> None:
    _, spans = read(written)
    found = cut(spans, 1, [0])
    assert {each.name for each in found if each.lane == "steps"} == {"step 1"}
    assert min(each.start_ms for each in found) == 0 and max(each.stop_ms for each in found) == 100
    pulls = [round(ms, 6) for each in found if each.name.startswith("pull of") for ms in each[3:5]]
    assert pulls == [0, 8, 0, 12, 92, 100, 93, 100], "those of step 0 end in it"
    both = cut(spans, 1)
    assert max(each.stop_ms for each in both) == 110, "to the end of the last rank"
    assert [round(each.start_ms, 6) for each in both if each.rank == 2] == [50], "the other push was later"


def test_tracks_and_kinds(written: Path) -> None:
    _, spans = read(written)
    found = tracks(cut(spans, 1))
    assert [(track.rank, track.title, track.lines) for track in found] == [
        *((rank, *rest) for rank in (0, 1) for rest in (("computes", 1), ("gradients", 1), ("parameters", 2))),
        (2, "serves", 1),
    ]
    computes, gradients, parameters = (found[at].bars for at in (3, 4, 5))
    # Rank 1 begins 10 ms later, so its step 0 is still seen.
    assert [bar.kind for bar in computes if bar.start_ms >= 10] == [
        *("forward", "waiting", "backward", "pack", "waiting", "waiting")
    ]
    assert [(bar.kind, bar.label) for bar in gradients if bar.start_ms >= 10] == [("gradients", "b0"), ("words", "")]
    assert [(bar.label, bar.line) for bar in parameters[-2:]] == [("h.0", 0), ("h.1 ..", 1)]
    assert [bar.kind for bar in found[6].bars] == ["gradients"]


def test_waiting_counts_once(written: Path) -> None:
    _, spans = read(written)
    computes = tracks(cut(spans, 1, [0]))[0]
    assert waited_ms(computes) == pytest.approx(5 + 25)


def test_titles() -> None:
    config = {"strategy": "dps", "model": "gpt2-tiny", "wire": "fp16", "overlap": "off", "servers": 2}
    assert title_of({"ranks": 4, "config": config}, 7, "2 hosts") == (
        "One step (7) of dps with 2 servers, wire fp16, without overlap, gpt2-tiny, 4 ranks, 2 hosts"
    )
    assert title_of({}, 0, "") == "One step (0) of ?"
