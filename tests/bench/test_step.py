"""What bench.step checks its contestants by: right steps pass, and every way of being wrong is seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.contestants.known_gradients import (
    FACTORS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Parameters,
    Reference,
    Work,
)
from bench.step import cells, rows

SHAPES = [torch.Size(shape) for shape in ((7, 19), (64,), (5, 31, 3), (1,))]
RANKS = 3


def works() -> list[Work]:
    ranks: list[Any] = [SimpleNamespace(rank=rank, size=RANKS) for rank in range(RANKS)]
    return [Work(SHAPES, each) for each in ranks]


def wrong(counted: list[int], clips: bool = True, skipped: int | None = None) -> int:
    """Steps by hand with the gradients of ``counted`` ranks over RANKS; what the reference finds wrong in all."""
    everyone = works()
    reference, model = Reference(everyone[0]), Parameters(SHAPES)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    bad = 0
    for step in range(2 * len(FACTORS)):
        for work in everyone:
            work.fill(step)
        for index, parameter in enumerate(parameters):
            parameter.grad = sum(everyone[rank].gradients[index] for rank in counted) / RANKS  # type: ignore[assignment]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM if clips else 1e9))
        if step != skipped:
            optimizer.step()
        bad += reference.wrong(norm, parameters)
    return bad


def test_a_right_step_passes() -> None:
    assert wrong([0, 1, 2]) == 0


@pytest.mark.parametrize(
    "broken", [{"counted": [0, 1]}, {"counted": [0, 0, 2]}, {"counted": [0, 1, 2], "skipped": 3}], ids=str
)
def test_a_wrong_one_does_not(broken: dict[str, Any]) -> None:
    assert wrong(**broken) > 0


def test_the_given_gradients_arrive() -> None:
    work, model = works()[1], Parameters(SHAPES)
    model(work.gradients).backward()
    for parameter, given in zip(model.parameters(), work.gradients, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, given)


def test_the_fastest_peer_that_is_right_is_compared_with() -> None:
    samples = {"dps": ([2.0, 3.0], 0), "gloo": ([1.0, 1.0], 4), "ddp": ([4.0, 6.0], 0), "horovod": ([8.0, 8.0], 0)}
    sides: dict[str, Any] = {name: SimpleNamespace(samples_s=times, bad=bad) for name, (times, bad) in samples.items()}
    ranks: Any = SimpleNamespace(size=2)
    found = {row["contestant"]: row for row in rows(sides, ranks, "gpt2-tiny", 10)}
    assert found["dps"]["best_peer"] == "ddp" and found["dps"]["ratio_best_peer"][0] == 0.5
    assert "best_peer" not in found["ddp"] and found["horovod"]["kind"] == "peer" and found["dps"]["kind"] == "commlab"
    assert cells(found["dps"])[-1].endswith(" ddp") and cells(found["ddp"])[-1] == ""
