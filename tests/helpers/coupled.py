"""Engines of three ranks that are threads, under every strategy that commlab exchanges for, and one whose gradients
somebody else exchanges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from crew import Crew, groups

import commlab
from commlab.errors import DisagreementError
from commlab.runtime.group import Group
from commlab.strategies.engine import Engine
from commlab.strategies.external import External
from commlab.strategies.options import Options

SIZE = 3
STRATEGIES = ("allreduce", "ps", "dps", "external")
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


class Everybody(External):
    """A library whose exchange commlab knows nothing of."""

    name = "external"

    def backward(self, loss: torch.Tensor | None, retain_graph: bool) -> None:
        super().backward(loss, retain_graph)
        for item in () if not self.buckets.syncing else self.training.parameters:
            if item.tensor.grad is None:
                item.tensor.grad = torch.zeros_like(item.tensor)
            commlab.allreduce(item.tensor.grad, "mean", item.name, group=self.training.group)


def model_of(seed: int = 0) -> torch.nn.Sequential:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    with torch.no_grad():
        for at, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).add(at + 10 * seed).sin().view(parameter.shape))
    return model


def couple(
    strategy: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, **more: Any
) -> Engine:
    if strategy == "external":
        return Engine(Everybody(model, optimizer, group, Options(**more)))
    return commlab.strategy(strategy, model, optimizer, group, **more)


def two_groups(model: torch.nn.Module, kind: Callable[..., Any] = torch.optim.AdamW) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    made: torch.optim.Optimizer = kind([{"params": matrices}, {"params": others, "lr": 0.02}], lr=0.01)
    return made


def build(crew: Crew, strategy: str, **options: Any) -> list[Engine]:
    ranks = groups(SIZE)

    def one(rank: int) -> Engine:
        model = model_of()
        return couple(strategy, model, two_groups(model), ranks[rank], **options)

    return crew.all(one)


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.arange(6.0).add(7 * rank + 31 * step).cos().view(2, 3)


def loss_of(engine: Engine, rank: int, step: int) -> torch.Tensor:
    found: torch.Tensor = engine.model(batch(rank, step)).square().sum()
    return found


def make_step(engine: Engine, rank: int, step: int, **more: Any) -> bool:
    engine.backward(loss_of(engine, rank, step))
    updated = engine.step(**more)
    engine.zero_grad()
    return updated


def values(engine: Engine) -> list[torch.Tensor]:
    return [item.tensor.detach().clone() for item in engine.parameters]


def errors_of(crew: Crew, task: Callable[[int], object]) -> list[str]:
    """The message of DisagreementError on every rank; "" where there is none."""

    def attempt(rank: int) -> str:
        try:
            task(rank)
        except DisagreementError as error:
            return str(error)
        return ""

    return crew.all(attempt)


def all_told(crew: Crew, engines: list[Engine], task: Callable[[int], object], *words: str) -> None:
    """``task`` ends in DisagreementError with all ``words`` on every rank, and no parameter has changed."""
    before = [values(engine) for engine in engines]
    told = errors_of(crew, task)
    for rank, text in enumerate(told):
        assert not [word for word in words if word not in text], (rank, text)
    for engine, old in zip(engines, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(values(engine), old, strict=True)), "nothing was updated"
