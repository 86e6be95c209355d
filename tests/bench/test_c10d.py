"""bench.c10d: how often a sample calls, and what is told of its calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bench import c10d


class Clock:
    """Time that passes only in what is measured; ``busy``: how much of it is CPU time."""

    def __init__(self, busy: float):
        self.now_s, self._busy = 0.0, busy

    def perf_counter(self) -> float:
        return self.now_s

    def process_time(self) -> float:
        return self.now_s * self._busy


def alone() -> Any:
    """The ranks of a benchmark of which the other one is twice as slow."""
    return SimpleNamespace(
        size=2,
        barrier=lambda: None,
        maximum=lambda values: [2 * value for value in values],
        total=lambda values: [3 * value for value in values],
    )


def test_a_sample_lasts_twenty_milliseconds_and_its_first_call_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(busy=0.5), {"quick": 0, "slow": 0}
    monkeypatch.setattr(c10d, "time", clock)
    barrier = [False]

    def quick() -> None:
        calls["quick"] += 1
        clock.now_s += 5e-3 if barrier[0] else 1e-3
        barrier[0] = False

    def slow() -> None:
        calls["slow"] += 1
        clock.now_s += 30e-3

    ranks = alone()
    ranks.barrier = lambda: barrier.__setitem__(0, True)
    found = c10d.interleaved(ranks, {"quick": quick, "slow": slow}, 3, lambda text: None)
    # One call of 5 ms, which is 10 on the slow rank: 2 calls next, of 6 ms together, which are 6 each there; then 3.
    assert calls == {"quick": 1 + 1 + 2 + 3 * 3, "slow": 3 + 3}
    assert found.first["quick"] == pytest.approx([10e-3] * 3)
    assert found.each["quick"] == pytest.approx([2 * 7e-3 / 3] * 3)
    assert found.cpu["quick"] == pytest.approx([3 * 0.5 * 7e-3 / 3 / 2] * 3)
    assert found.first["slow"] == found.each["slow"] == pytest.approx([60e-3] * 3)
    assert set(found.each) == {"quick", "slow"} == set(found.cpu)


def test_what_a_step_adds_is_seen_round_by_round() -> None:
    """The second round was slow throughout."""
    assert c10d._added_us({"gloo": [3.0, 9.0, 4.0], "alone": [2.0, 8.0, 2.0]}, "gloo") == 1e6
