"""A gradient, a norm or a loss that is inf or NaN: one verdict for all ranks, and what follows from it by the rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from coupled import SIZE, build, couple, every_strategy, model_of, values
from crew import Crew, groups

from commlab.errors import NotFiniteError
from commlab.native.norm import clip_factor
from commlab.strategies.engine import Engine


def backward(engine: Engine, rank: int, bad_rank: int, number: float) -> None:
    """Of the bad rank the gradient of ``2.weight[1, 2]`` is ``number``; all other gradients are ``rank + 1``."""
    loss = torch.zeros(())
    for name, parameter in engine.strategy.training.model.named_parameters():
        factors = torch.full_like(parameter, rank + 1)
        if name == "2.weight" and rank == bad_rank:
            factors[1, 2] = number
        loss = loss + (parameter * factors).sum()
    engine.backward(loss - loss.detach() if math.isfinite(number) else loss)


def test_the_clip_factor_is_torchs() -> None:
    """A14: NaN and inf in the norm."""
    assert math.isnan(clip_factor(math.nan, 1.0))
    assert clip_factor(math.inf, 1.0) == 0.0
    assert clip_factor(0.5, 1.0) == 1.0 and clip_factor(math.nan, None) == 1.0
    assert clip_factor(2.0, 1.0) == 1.0 / (2.0 + 1e-6)


@every_strategy
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("fused", [False, True])
def test_torchs_rule_is_what_torch_does(crew: Crew, strategy: str, number: float, fused: bool) -> None:
    """A14: by default a NaN norm makes every gradient NaN, and an infinite one makes finite ones 0; with a fused
    optimizer too."""
    ranks = groups(SIZE)

    def one(rank: int) -> list[torch.Tensor]:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        engine = couple(strategy, model, optimizer, ranks[rank], max_grad_norm=1.0)
        backward(engine, rank, 1, number)
        assert engine.step()
        assert engine.grad_norm is not None and not math.isfinite(engine.grad_norm)
        return values(engine)

    twin = model_of()
    for name, parameter in twin.named_parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
        if name == "2.weight":
            parameter.grad[1, 2] = number
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    for found in crew.all(one):
        for mine, theirs in zip(found, twin.parameters(), strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())
            assert torch.allclose(mine.nan_to_num(), theirs.detach().nan_to_num())


@every_strategy
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("number", [math.nan, -math.inf])
def test_error_names_rank_and_parameter_and_the_engine_goes_on(
    crew: Crew, strategy: str, clip: float | None, number: float
) -> None:
    """A14: nonfinite="error"."""
    engines = build(crew, strategy, nonfinite="error", max_grad_norm=clip)
    before = values(engines[0])

    def one(rank: int) -> str:
        backward(engines[rank], rank, 2, number)
        with pytest.raises(NotFiniteError) as told:
            engines[rank].step()
        return str(told.value)

    for text in crew.all(one):
        assert "in step 0 the gradient is not finite" in text and "rank 2: the loss" in text, text
        assert "'2.weight'" in text and "Nothing was updated" in text, text
    for engine in engines:
        assert all(torch.equal(a, b) for a, b in zip(values(engine), before, strict=True))

    def again(rank: int) -> bool:
        backward(engines[rank], rank, -1, 0.0)
        return engines[rank].step()

    assert crew.all(again) == [True] * SIZE and engines[0].steps == 1 and engines[0].skipped_steps == 0


@every_strategy
def test_skip_leaves_the_step_out_on_all_ranks(crew: Crew, strategy: str) -> None:
    """A14: nonfinite="skip"; also where the loss alone is infinite."""
    engines = build(crew, strategy, nonfinite="skip")
    before = values(engines[0])

    def bad(rank: int, of_gradient: bool) -> bool:
        engine = engines[rank]
        if of_gradient:
            backward(engine, rank, 0, math.nan)
        else:
            engine.backward(engine.model(torch.ones(2, 3)).sum() + (math.inf if rank == 1 else 0.0))
        updated = engine.step()
        engine.zero_grad()
        return updated

    assert crew.all(lambda rank: bad(rank, True)) == [False] * SIZE
    assert crew.all(lambda rank: bad(rank, False)) == [False] * SIZE
    for engine in engines:
        assert engine.skipped_steps == engine.steps == 2
        assert all(torch.equal(a, b) for a, b in zip(values(engine), before, strict=True))


@pytest.mark.parametrize("strategy", ["allreduce", "dps"])
@pytest.mark.parametrize("rule", ["torch", "skip"])
def test_what_a_wire_cannot_carry(crew: Crew, strategy: str, rule: str) -> None:
    """A14: a finite gradient that overflows on a 16-bit wire: never an update; the engine goes on."""
    engines = build(crew, strategy, wire="fp16", nonfinite=rule)

    def one(rank: int) -> str:
        backward(engines[rank], rank, 1, 1e6)
        try:
            assert engines[rank].step() is False
        except NotFiniteError as error:
            return str(error)
        engines[rank].zero_grad()
        return ""

    for text in crew.all(one):
        assert not text if rule == "skip" else "could not travel on wire fp16" in text and "rank 1: the" in text

    def again(rank: int) -> bool:
        backward(engines[rank], rank, -1, 0.0)
        return engines[rank].step()

    assert crew.all(again) == [True] * SIZE


@every_strategy
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "nonfinite": "error"}])
def test_another_default_dtype(crew: Crew, strategy: str, options: dict[str, Any]) -> None:
    """A14: torch.set_default_dtype(float64), and models of either precision under it."""
    ranks, others = groups(SIZE), groups(SIZE)

    def one(rank: int) -> list[torch.Tensor]:
        found = []
        for dtype, group in ((torch.float32, ranks[rank]), (torch.float64, others[rank])):
            model = model_of().to(dtype)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
            engine = couple(strategy, model, optimizer, group, **options)
            for _ in range(2):
                engine.backward(engine.model(torch.ones(2, 3, dtype=dtype)).square().sum(), 0.5)
                assert engine.step()
                engine.zero_grad()
            engine.settle()
            found += values(engine)
        return found

    wanted = crew.all(one)
    ranks, others = groups(SIZE), groups(SIZE)
    torch.set_default_dtype(torch.float64)
    try:
        found = crew.all(one)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, theirs in zip(found, wanted, strict=True):
        # The models are made of arange().sin(), which the default dtype rounds: so to fp32.
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(mine, theirs, strict=True))
