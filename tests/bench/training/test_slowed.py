"""The slow worker: one rank is slowed, by the processor time of its forward and backward passes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.training import slowed


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the rank slept, nap by nap. The trainer is left out."""
    taken: list[float] = []
    monkeypatch.setattr(slowed.time, "sleep", taken.append)
    monkeypatch.setattr(slowed.train, "main", lambda flags: len(flags))
    return taken


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The processor time of this process, which passes only by hand. What slows models is removed afterwards."""
    now_s, made = [0.0], []
    monkeypatch.setattr(slowed.time, "process_time", lambda: now_s[0])
    slow_model = slowed.SlowModel

    def remember(factor: float) -> slowed.SlowModel:
        made.append(slow_model(factor))
        return made[-1]

    monkeypatch.setattr(slowed, "SlowModel", remember)
    yield now_s
    for each in made:
        each.remove()


def step(model: torch.nn.Module, clock: list[float]) -> None:
    clock[0] = 10.0
    loss = model(torch.ones(2, 3)).sum()
    clock[0] = 10.5
    loss.backward()


def two_layers() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))


def test_only_the_slow_rank_is_slowed(monkeypatch: pytest.MonkeyPatch, naps: list[float], clock: list[float]) -> None:
    monkeypatch.setattr(slowed.sys, "argv", ["slowed", "1", "5", "--steps", "3"])
    assert slowed.main() == 2
    step(two_layers(), clock)
    assert not naps, "this is rank 0"


def test_it_sleeps_by_the_processor_time_of_forward_and_backward_times_the_factor_less_one(
    monkeypatch: pytest.MonkeyPatch, naps: list[float], clock: list[float]
) -> None:
    monkeypatch.setattr(slowed.sys, "argv", ["slowed", "0", "5", "--steps", "3"])
    assert slowed.main() == 2
    model = two_layers()
    step(model, clock)
    assert naps == [2.0], "once, at the end of backward"
    with torch.no_grad():
        model(torch.ones(2, 3))
    assert naps == [2.0], "evaluating is not slowed"
    step(model, clock)
    step(two_layers(), clock)
    assert naps == [2.0, 2.0], "another model is not slowed"
