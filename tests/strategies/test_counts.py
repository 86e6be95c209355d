"""What a rank's samples weigh in a step: counts that are none, weights of any size, and nothing at all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from coupled import (
    SIZE,
    batch,
    build,
    couple,
    every_strategy,
    loss_of,
    model_of,
    values,
)
from crew import Crew, groups

import commlab
from commlab.errors import UsageError


@pytest.mark.parametrize("strategy", ["single", "allreduce", "dps"])
@pytest.mark.parametrize("bad", [-1, -0.25, math.nan, math.inf, "many", torch.ones(2), [3]])
def test_counts_that_are_none_are_refused(strategy: str, bad: Any) -> None:
    """A11: counts that are negative, NaN, infinite, or no numbers."""
    model = model_of()
    engine = commlab.strategy(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), groups(1)[0])
    for arguments in ((bad,), (1.0, bad)):
        with pytest.raises(
            UsageError, match=rf"rank 0: backward\(\) was given {'count' if len(arguments) < 2 else 'total'}="
        ):
            engine.backward(engine.model(batch(0, 0)).sum(), *arguments)
    with pytest.raises(UsageError, match=r"total=3 without a count"):
        engine.backward(engine.model(batch(0, 0)).sum(), None, 3)


WEIGHTS = ((0.7, 0.0), (0.05, 0.1), (0.0, 0.31))
"""Of two samples of each rank: sums below 1, and a rank without any in its first micro-batch."""


@every_strategy
@pytest.mark.parametrize("total_known", [True, False])
@pytest.mark.parametrize("factor", [1.0, 0.25, 2.0**40])
def test_weights_count_as_they_are(crew: Crew, strategy: str, total_known: bool, factor: float) -> None:
    """A11: float counts, and totals below 1: against the weighted mean in float64."""
    engines = build(crew, strategy)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64) * factor
    total = float(weights.sum()) if total_known else None
    twin = model_of().double()
    inputs = torch.stack([batch(rank, 0) for rank in range(SIZE)]).double()
    losses = twin(inputs).square().sum(-1)
    ((losses * weights).sum() / weights.sum()).backward()
    gradients = [parameter.grad for parameter in twin.parameters()]

    def sgd(rank: int) -> list[torch.Tensor]:
        engine = engines[rank]
        for at in (0, 1):
            loss = (engine.model(batch(rank, 0)[at]).square().sum() * weights[rank, at]).float()
            if at == 0:
                with engine.no_sync():
                    engine.backward(loss, float(weights[rank, at]), total)
            else:
                engine.backward(loss, weights[rank, at], total)
        engine.step()
        return values(engine)

    for engine in engines:
        for entry in engine.optimizer.param_groups:
            entry.update(lr=0.125, betas=(0.0, 0.0), eps=1e30, weight_decay=0.0)  # AdamW: lr / eps x gradient
            entry["eps"], entry["lr"] = 2.0**20, 2.0**17
    before = model_of()
    for after in crew.all(sgd):
        for was, now, gradient in zip(before.parameters(), after, gradients, strict=True):
            assert gradient is not None
            wanted = was.double() - 2.0**17 * gradient / (gradient.abs() + 2.0**20)
            assert torch.allclose(now.double(), wanted, rtol=3e-6, atol=3e-6)


@every_strategy
def test_whole_counts_are_exact(crew: Crew, strategy: str) -> None:
    """A11: whole numbers up to 2^53, whose sum float32 would round."""
    ranks = groups(SIZE)
    counts = [2**24 + 1, 2**52 - 2**24 - 1, 3]

    def one(rank: int) -> float:
        model = torch.nn.Linear(1, 1, bias=False).double()
        engine = couple(strategy, model, torch.optim.SGD(model.parameters(), lr=1.0), ranks[rank])
        with torch.no_grad():
            before = float(engine.model.weight.detach())
        engine.backward(engine.model(torch.full((1, 1), float(2**52 + 3), dtype=torch.float64)).sum(), counts[rank])
        engine.step()
        return before - float(engine.model.weight.detach())

    for moved in crew.all(one):
        assert moved == pytest.approx(SIZE, rel=1e-15)


@every_strategy
@pytest.mark.parametrize("total", [None, 0, 0.0])
def test_a_global_count_of_nothing_gives_no_gradient(crew: Crew, strategy: str, total: float | None) -> None:
    """A11: a batch all of which is masked."""
    engines = build(crew, strategy, max_grad_norm=1.0)
    before = values(engines[0])
    for engine in engines:
        for entry in engine.optimizer.param_groups:
            entry["weight_decay"] = 0.0

    def step(rank: int) -> float | None:
        engines[rank].backward(loss_of(engines[rank], rank, 0), 0, total)
        engines[rank].step()
        return engines[rank].grad_norm

    assert crew.all(step) == [0.0] * SIZE
    assert all(torch.equal(a, b) for engine in engines for a, b in zip(values(engine), before, strict=True))
