"""A rank that drops a step alone is named at the next one; steps that all ranks drop are none's fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from coupled import (
    all_told,
    batch,
    build,
    errors_of,
    every_strategy,
    loss_of,
    make_step,
)
from crew import Crew

from commlab.strategies.engine import Engine


def skip_before_forward(engine: Engine, _: int, __: int) -> None:
    engine.zero_grad()


def catch_in_forward(engine: Engine, rank: int, step: int) -> None:
    hook = engine.model[1].register_forward_pre_hook(_out_of_memory)
    with pytest.raises(MemoryError):
        loss_of(engine, rank, step)
    hook.remove()


def catch_in_backward(engine: Engine, rank: int, step: int) -> None:
    hidden = engine.model[0](batch(rank, step))
    hidden.register_hook(_out_of_memory)
    with pytest.raises(MemoryError):
        # Before the gradient of the first layer, and so before the only bucket is full.
        engine.backward(engine.model[2](hidden.tanh()).square().sum())
    engine.zero_grad()


def skip_after_forward(engine: Engine, rank: int, step: int) -> None:
    loss_of(engine, rank, step)


def _out_of_memory(*_: Any) -> None:
    raise MemoryError("as if")


@every_strategy
@pytest.mark.parametrize(
    "skip, did",
    [
        (skip_before_forward, "(it called zero_grad() 2 times since its last step)"),
        (catch_in_forward, "(1 of its forward passes ended in an exception)"),
        (catch_in_backward, "zero_grad() 2 times since its last step and it called backward() 2 times since its last"),
        (skip_after_forward, "(it called the model more often than its losses need)"),
    ],
)
def test_a_rank_that_drops_a_step_is_named_at_the_next_one(
    crew: Crew, strategy: str, skip: Callable[[Engine, int, int], None], did: str
) -> None:
    """A19: one rank skips a step, or catches an exception, and goes on."""
    if strategy == "external" and skip is catch_in_backward:
        pytest.skip("its library has exchanged a part of the gradient, or waits")
    engines = build(crew, strategy)
    for step in (0, 1):
        crew.all(lambda rank: make_step(engines[rank], rank, step))  # noqa: B023 - called here

    def go_on(rank: int) -> None:
        if rank == 1:
            skip(engines[rank], rank, 2)
        make_step(engines[rank], rank, 2 + (rank == 1))

    all_told(crew, engines, go_on, "rank 1 is in step 3", "ranks 0, 2 are in step 2", "caught an exception", did)


@every_strategy
def test_steps_that_all_ranks_drop_are_no_disagreement(crew: Crew, strategy: str) -> None:
    """A19: an exception on every rank."""
    engines = build(crew, strategy)
    crew.all(lambda rank: make_step(engines[rank], rank, 0))
    crew.all(lambda rank: catch_in_forward(engines[rank], rank, 1))
    assert all(crew.all(lambda rank: make_step(engines[rank], rank, 2)))
    crew.all(lambda rank: skip_before_forward(engines[rank], rank, 3))
    assert all(crew.all(lambda rank: make_step(engines[rank], rank, 4)))


@every_strategy
def test_forward_passes_of_any_pattern_are_no_disagreement(crew: Crew, strategy: str) -> None:
    """A19: ragged micro-batches, ranks without samples, sequences of different lengths, passes without gradients."""
    engines = build(crew, strategy)

    def step(rank: int, step: int) -> bool:
        engine = engines[rank]
        for _ in range(rank + step):
            with engine.no_sync():
                engine.backward(loss_of(engine, rank, step), 1)
        with torch.no_grad():
            loss_of(engine, rank, step) if rank == 2 else None
        if rank == step:
            engine.backward(None, 0)
        else:
            engine.backward(loss_of(engine, rank, step), 1)
        updated = engine.step()
        engine.zero_grad()
        return updated

    for number in range(4):
        assert all(crew.all(lambda rank: step(rank, number)))  # noqa: B023 - called here

    def recurrent(rank: int, step: int) -> bool:
        engine = engines[rank]
        engine.backward(sum(loss_of(engine, rank, at) for at in range(1 + (rank * step) % 4)))
        updated = engine.step()
        engine.zero_grad()
        return updated

    engines = build(crew, strategy)
    for number in range(1, 5):
        assert all(crew.all(lambda rank: recurrent(rank, number)))  # noqa: B023 - called here


@every_strategy
def test_numbers_of_the_callers_own_decide(crew: Crew, strategy: str) -> None:
    """A19: a loop that gives its steps' numbers; a forward pass that was repeated is no dropped step then."""
    engines = build(crew, strategy)
    crew.all(lambda rank: make_step(engines[rank], rank, 0, number=70))

    def retried(rank: int) -> bool:
        if rank == 1:
            catch_in_forward(engines[rank], rank, 1)
        return make_step(engines[rank], rank, 1, number=71)

    assert all(crew.all(retried))
    all_told(
        crew,
        engines,
        lambda rank: make_step(engines[rank], rank, 2, number=72 + (rank == 1)),
        "rank 1 is in step 73, ranks 0, 2 are in step 72",
    )
    engines = build(crew, strategy)
    all_told(
        crew,
        engines,
        lambda rank: make_step(engines[rank], rank, 0, **({"number": 5} if rank == 2 else {})),
        "some ranks have given engine.step() a number",
    )


def test_turns_give_steps_their_numbers(crew: Crew) -> None:
    """A19: a rank that skips a step of ``engine.turns()``, with nothing else to see."""
    engines = build(crew, "allreduce")

    def loop(rank: int) -> None:
        for step, _ in engines[rank].turns(0, 4):
            if rank != 1 or step != 2:
                make_step(engines[rank], rank, step)

    told = errors_of(crew, loop)
    assert all("rank 1 is in step 3, ranks 0, 2 are in step 2" in text for text in told), told
