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
    KnownGradients,
    Parameters,
    Reference,
)

SHAPES = [torch.Size(shape) for shape in ((7, 19), (64,), (5, 31, 3), (1,))]
RANKS = 3


def everyone() -> list[KnownGradients]:
    ranks: list[Any] = [SimpleNamespace(rank=rank, size=RANKS) for rank in range(RANKS)]
    return [KnownGradients(SHAPES, each) for each in ranks]


def wrong(counted: list[int], clips: bool = True, skipped: int | None = None) -> int:
    """Steps by hand with the gradients of ``counted`` ranks over RANKS; what the reference finds wrong in all."""
    ranks = everyone()
    reference, model = Reference(ranks[0]), Parameters(SHAPES)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    count = 0
    for step in range(2 * len(FACTORS)):
        for known in ranks:
            known.fill(step)
        for index, parameter in enumerate(parameters):
            parameter.grad = sum(ranks[rank].gradients[index] for rank in counted) / RANKS  # type: ignore[assignment]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM if clips else 1e9))
        if step != skipped:
            optimizer.step()
        count += reference.wrong(norm, parameters)
    return count


def test_a_right_step_passes() -> None:
    assert wrong([0, 1, 2]) == 0


@pytest.mark.parametrize(
    "broken", [{"counted": [0, 1]}, {"counted": [0, 0, 2]}, {"counted": [0, 1, 2], "skipped": 3}], ids=str
)
def test_a_wrong_one_does_not(broken: dict[str, Any]) -> None:
    assert wrong(**broken) > 0


def test_the_known_gradients_arrive() -> None:
    known, model = everyone()[1], Parameters(SHAPES)
    model(known.gradients).backward()
    for parameter, gradient in zip(model.parameters(), known.gradients, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)
