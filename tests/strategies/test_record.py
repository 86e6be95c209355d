"""Ranks that would not update alike are told so, all of them, before anything is updated.

On one rank in turn of three, under every strategy that commlab itself exchanges for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from coupled import (
    SIZE,
    all_told,
    build,
    couple,
    errors_of,
    every_strategy,
    loss_of,
    make_step,
    model_of,
    two_groups,
    values,
)
from crew import Crew, groups

import commlab
from commlab.precision.loss_scale import LossScale
from commlab.strategies.engine import Engine


def plateau(engine: Engine) -> None:
    engine.optimizer.param_groups[1]["lr"] *= 0.1


def set_hyper(key: str, value: object) -> Callable[[Engine], None]:
    def change(engine: Engine) -> None:
        engine.optimizer.param_groups[0][key] = value

    return change


CHANGES: dict[str, tuple[Callable[[Engine], None], tuple[str, ...]]] = {
    "lr by a scheduler": (plateau, ("'lr' of parameter group 1", "rank 1: 0.002", "ranks 0, 2: 0.02")),
    "betas": (set_hyper("betas", (0.8, 0.999)), ("'betas' of parameter group 0", "rank 1: (0.8, 0.999)")),
    "weight decay": (set_hyper("weight_decay", 0.5), ("'weight_decay' of parameter group 0", "rank 1: 0.5")),
    "maximize": (set_hyper("maximize", True), ("'maximize' of parameter group 0", "rank 1: True")),
    "lr as a tensor": (set_hyper("lr", torch.tensor(0.25)), ("'lr' of parameter group 0", "rank 1: 0.25")),
    "a key of the user's own": (set_hyper("layer", "last"), ("'layer' of parameter group 0", "ranks 0, 2: none")),
    "none": (set_hyper("foreach", True), ("'foreach' of parameter group 0", "rank 1: True", "ranks 0, 2: None")),
}


@every_strategy
@pytest.mark.parametrize("name", CHANGES)
def test_hyper_parameters_that_differ_are_named(crew: Crew, strategy: str, name: str) -> None:
    """A3: hyper-parameters differ between ranks."""
    change, words = CHANGES[name]
    engines = build(crew, strategy, max_grad_norm=1.0)
    crew.all(lambda rank: make_step(engines[rank], rank, 0))
    change(engines[1])
    all_told(crew, engines, lambda rank: make_step(engines[rank], rank, 1), "step 1", *words, "Nothing was updated")
    # The step that was refused is dropped; made alike, ranks can make the next one.
    for rank in (0, 2):
        change(engines[rank])
    assert crew.all(lambda rank: make_step(engines[rank], rank, 2)) == [True] * SIZE


@every_strategy
def test_totals_that_differ_are_named(crew: Crew, strategy: str) -> None:
    """A3: the caller's totals differ."""
    engines = build(crew, strategy)

    def step(rank: int, total: float | None) -> bool:
        engines[rank].backward(loss_of(engines[rank], rank, 0), 2, total)
        return engines[rank].step()

    all_told(crew, engines, lambda rank: step(rank, 6 + (rank == 2)), "ranks 0, 1: 6", "rank 2: 7", "total")


@pytest.mark.parametrize("strategy", ["allreduce", "dps"])
@pytest.mark.parametrize(
    "option, value, words",
    [
        ("max_grad_norm", 2.0, "max_grad_norm, rank 0: 1.0, ranks 1, 2: 2.0"),
        ("wire", "fp16", "wire, rank 0: None, ranks 1, 2: 'fp16'"),
        ("loss_scale", LossScale(8.0), "loss_scale, rank 0: None, ranks 1, 2: LossScale"),
        ("buffers", "mean", "buffers, rank 0: 'broadcast', ranks 1, 2: 'mean'"),
    ],
)
def test_options_that_differ_are_named(crew: Crew, strategy: str, option: str, value: Any, words: str) -> None:
    """A3: options differ between ranks."""
    ranks = groups(SIZE)

    def one(rank: int) -> Engine:
        options: dict[str, Any] = {"max_grad_norm": 1.0, **({option: value} if rank else {})}
        model = model_of()
        return commlab.strategy(strategy, model, two_groups(model), ranks[rank], **options)

    told = errors_of(crew, one)
    assert all(words in text for text in told), told


def test_optimizers_that_differ_are_named(crew: Crew) -> None:
    """A3: the classes and groups of optimizers differ between ranks."""
    ranks = groups(SIZE)

    def classes(rank: int) -> Engine:
        model = model_of()
        kind = torch.optim.SGD if rank == 1 else torch.optim.AdamW
        return couple("allreduce", model, two_groups(model, kind), ranks[rank])

    told = errors_of(crew, classes)
    assert all("the optimizer's class: ranks 0, 2: 'AdamW', rank 1: 'SGD'" in text for text in told), told

    again = groups(SIZE)

    def members(rank: int) -> Engine:
        model = model_of()
        parameters = list(model.parameters())
        cut = 2 if rank == 2 else 1
        optimizer = torch.optim.SGD([{"params": parameters[:cut]}, {"params": parameters[cut:]}], lr=0.1)
        return couple("allreduce", model, optimizer, again[rank])

    told = errors_of(crew, members)
    assert all("entry 1 of parameter group 0: ranks 0, 1: none, rank 2: '0.bias'" in text for text in told), told


@every_strategy
def test_schedulers_that_agree_are_no_disagreement(crew: Crew, strategy: str) -> None:
    """A3: values that change in every step, alike on all ranks, in spite of another order of keys and of whole numbers
    that are floats elsewhere."""
    engines = build(crew, strategy)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(engine.optimizer, 0.1, total_steps=9) for engine in engines]
    entry = engines[2].optimizer.param_groups[0]
    entry["weight_decay"] = 0
    for rank in (0, 1):
        engines[rank].optimizer.param_groups[0]["weight_decay"] = 0.0
    turned = dict(reversed(list(entry.items())))
    entry.clear()
    entry.update(turned)
    for step in range(5):
        assert all(crew.all(lambda rank: make_step(engines[rank], rank, step)))  # noqa: B023 - called here
        for schedule in schedules:
            schedule.step()
    first = values(engines[0])
    assert all(torch.equal(a, b) for engine in engines for a, b in zip(values(engine), first, strict=True))
