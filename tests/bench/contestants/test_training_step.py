"""The steps of bench.overlap: right steps pass, and what is wrong is seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import overlapped
import pytest
import torch
from training import alone

from bench.contestants import training_step
from bench.contestants.training_step import Computing, Task, TrainingStep


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> TrainingStep:
    """Of one rank, which sends nothing."""
    monkeypatch.setattr(training_step, "build_model", overlapped.build)
    ranks: Any = SimpleNamespace(rank=0, size=1, barrier=lambda: None, maximum=list, total=list)
    made = TrainingStep("allreduce", Task("tiny", 2, 5, alone(), ranks, 0), 10**6)
    Computing(made).measure()
    return made


def test_right_steps_pass_with_and_without_overlap(step: TrainingStep) -> None:
    for on in (True, False, True):
        step.step(overlap=on)
        assert step.buckets.overlap == on
        assert all(torch.equal(*pair) for pair in zip(step.model.parameters(), step.task.start, strict=True))
    assert step.wrong == 0


def test_another_gradient_is_wrong(step: TrainingStep) -> None:
    step.task.mean = [mean * 1.01 for mean in step.task.mean]
    step.step(overlap=True)
    assert step.wrong > 0


def test_other_bits_than_before_are_wrong(step: TrainingStep) -> None:
    step.step(overlap=True)
    assert step.wrong == 0
    step._check_bits()
    assert step.wrong == 1, "the parameters are those from before the step again"
