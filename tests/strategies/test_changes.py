"""What is trained changes in mid-training, under every strategy: as in plain torch, and agreed upon by all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crew import Crew, crew_of, groups
from learners import (
    CASES,
    Step,
    assert_like,
    everything,
    freeze,
    head_only,
    learner,
    loss_of,
    plain,
    trained,
    unfreeze,
)
from training import digest

import commlab
from commlab.errors import DisagreementError, UsageError
from commlab.strategies.engine import Engine

SIZE = 3
OURS = ("allreduce", "ps", "dps")


crew = crew_of(SIZE)


@pytest.mark.parametrize("strategy", OURS)
@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_in_torch(crew: Crew, strategy: str, case: str) -> None:
    """A2, B7: unfrozen, frozen, removed, added again, renamed, replaced; and the state that comes back at the end."""
    wanted, of_rank = plain(*CASES[case]), groups(SIZE)

    def run(rank: int) -> bytes:
        model, optimizer, engine = trained(of_rank[rank], strategy, case, bucket_bytes=700)
        found = digest(model)
        engine.close()
        assert_like((model, optimizer), wanted)
        return found

    assert len(set(crew.all(run))) == 1, "ranks have different parameters"


@pytest.mark.parametrize("strategy", OURS)
def test_a_step_that_accumulates_may_begin_with_a_change(crew: Crew, strategy: str) -> None:
    """A2: the first of a step's micro-batches, inside no_sync, is where a frozen layer is seen."""
    of_rank = groups(SIZE)
    wanted = learner()
    optimizer = torch.optim.SGD(wanted.parameters(), lr=0.1)
    for step in (0, 1):
        wanted[2].weight.requires_grad_(step == 0)
        optimizer.zero_grad()
        ((loss_of(wanted, 2 * step) + loss_of(wanted, 2 * step + 1)) / 2).backward()
        optimizer.step()

    def run(rank: int) -> torch.nn.Module:
        model = learner()
        engine = commlab.strategy(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), of_rank[rank])
        for step in (0, 1):
            model[2].weight.requires_grad_(step == 0)
            with engine.no_sync():
                engine.backward(loss_of(model, 2 * step, rank, SIZE) / 2)
            engine.backward(loss_of(model, 2 * step + 1, rank, SIZE) / 2)
            engine.step()
            engine.zero_grad()
        engine.close()
        return model

    for model in crew.all(run):
        for mine, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("strategy", OURS)
def test_a_change_right_before_the_end_is_given_back(crew: Crew, strategy: str) -> None:
    """A2, A13: close() follows add_param_group() without a step between them."""
    of_rank = groups(SIZE)

    def run(rank: int) -> None:
        model = learner()
        first = list(model[0].parameters())
        for parameter in first:
            parameter.requires_grad_(False)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
        engine = commlab.strategy(strategy, model, optimizer, of_rank[rank])
        engine.backward(loss_of(model, 0, rank, SIZE))
        engine.step()
        engine.zero_grad()
        for parameter in first:
            parameter.requires_grad_(True)
        optimizer.add_param_group({"params": first, "lr": 0.5})
        engine.close()
        assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2]
        assert all(each is mine for each, mine in zip(optimizer.param_groups[1]["params"], first, strict=True))
        assert all(optimizer.state[each]["exp_avg"].shape == each.shape for each in optimizer.param_groups[0]["params"])

    crew.all(run)


def outcomes(crew: Crew, task: Any) -> list[str]:
    """What every rank raised: the class and the message; empty where it raised nothing."""

    def run(rank: int) -> str:
        try:
            task(rank)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return crew.all(run)


@pytest.mark.parametrize("strategy", OURS)
def test_a_change_on_one_rank_is_named_on_all(crew: Crew, strategy: str) -> None:
    """A2: one rank alone unfreezes a layer."""
    of_rank = groups(SIZE)

    def run(rank: int) -> None:
        model = learner()
        optimizer = head_only(model)
        engine = commlab.strategy(strategy, model, optimizer, of_rank[rank])
        if rank == 1:
            unfreeze(2)(model, optimizer)
        engine.backward(loss_of(model, 0, rank, SIZE))
        engine.step()

    for text in outcomes(crew, run):
        assert text.startswith(DisagreementError.__name__), text
        assert "'2.weight' is trainable now" in text and "rank 1: " in text and "ranks 0, 2: " in text


@pytest.mark.parametrize("strategy", OURS)
def test_another_change_on_every_rank_is_named(crew: Crew, strategy: str) -> None:
    """A2: ranks unfreeze different layers, or put them into groups in another order."""
    of_rank = groups(SIZE)

    def run(rank: int) -> None:
        model = learner()
        optimizer = head_only(model)
        engine = commlab.strategy(strategy, model, optimizer, of_rank[rank])
        for layer in (0, 2) if rank else (2, 0):
            unfreeze(layer)(model, optimizer)
        engine.backward(loss_of(model, 0, rank, SIZE))

    for text in outcomes(crew, run):
        assert "'0.weight' is float64[33, 7] in group 2 on rank 0 and float64[33, 7] in group 1 on rank 1" in text


def forget_the_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model[2].requires_grad_(True)


def forget_the_model(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model[4] = torch.nn.Linear(17, 5).double()


def give_twice(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [model[4].weight]})


def freeze_all(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.requires_grad_(False)


def make_integer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model[0].extra = torch.nn.Parameter(torch.zeros(3, device="meta"), requires_grad=False)


@pytest.mark.parametrize("strategy", OURS)
@pytest.mark.parametrize(
    "change, message",
    [
        (forget_the_optimizer, "'2.weight' is trainable, but the optimizer does not have it"),
        (forget_the_model, "'4.weight' is trainable, but the optimizer does not have it"),
        (give_twice, "'4.weight': in two groups of the optimizer"),
        (freeze_all, "there is nothing to train"),
        (make_integer, "'0.extra' of shape [3] is on the meta device"),
    ],
)
def test_what_cannot_be_trained_is_refused_on_all_ranks(crew: Crew, strategy: str, change: Step, message: str) -> None:
    """A2, A8, B7: a parameter that the optimizer lacks, one that was replaced, one that is in two groups."""
    of_rank = groups(SIZE)

    def run(rank: int) -> None:
        model = learner()
        optimizer = head_only(model)
        engine = commlab.strategy(strategy, model, optimizer, of_rank[rank])
        change(model, optimizer)
        engine.backward(loss_of(model, 0, rank, SIZE) + 0 * sum(p.sum() for p in model[4].parameters()))

    for text in outcomes(crew, run):
        assert message in text, text


def test_newly_trained_parameters_are_rank_0s(crew: Crew) -> None:
    """A2: a layer that was frozen, and has other numbers on every rank by now."""
    for strategy in OURS:
        of_rank = groups(SIZE)

        def run(rank: int, strategy: str = strategy, of_rank: Any = of_rank) -> bytes:
            model = learner()
            optimizer = head_only(model)
            engine = commlab.strategy(strategy, model, optimizer, of_rank[rank])
            with torch.no_grad():
                model[2].weight.add_(rank)
            unfreeze(2)(model, optimizer)
            engine.settle()
            assert torch.equal(model[2].weight, learner()[2].weight)
            engine.backward(loss_of(model, 0, rank, SIZE))
            engine.step()
            return digest(model)

        assert len(set(crew.all(run))) == 1


@pytest.mark.parametrize("strategy", ["single", *OURS])
def test_a_change_within_a_step_is_refused(strategy: str) -> None:
    """A2: between the micro-batches of one step there are gradients already."""
    model = learner()
    optimizer = head_only(model)
    engine = commlab.strategy(strategy, model, optimizer, groups(1)[0])
    with engine.no_sync():
        engine.backward(loss_of(model, 0))
    unfreeze(2)(model, optimizer)
    with pytest.raises(UsageError, match=r"'2\.weight' is trainable now.*within a step"):
        engine.backward(loss_of(model, 0))


@pytest.mark.parametrize("strategy", ["single", *OURS])
def test_state_waits_until_a_change_was_taken_in(strategy: str) -> None:
    """A2: state_dict() is not collective, so it can't take a change in."""
    model = learner()
    optimizer = head_only(model)
    engine = commlab.strategy(strategy, model, optimizer, groups(1)[0])
    unfreeze(2)(model, optimizer)
    with pytest.raises(UsageError, match=r"state_dict\(\) before all ranks have taken in.*engine.settle\(\)"):
        engine.state_dict()
    engine.settle()
    assert "2.weight" in engine.state_dict()["pieces"]


@pytest.mark.parametrize("strategy", OURS)
def test_what_is_frozen_keeps_its_state_in_a_checkpoint(crew: Crew, strategy: str) -> None:
    """A2, B7: saved while a layer is frozen, loaded, and trained again."""
    make, steps = everything, [None, None, freeze(0), None, freeze(0, False), None]
    model, _ = plain(make, steps)
    of_rank, again = groups(SIZE), groups(SIZE)
    parts: list[Any] = [None] * SIZE

    def first(rank: int) -> None:
        mine = learner()
        optimizer = make(mine)
        engine = commlab.strategy(strategy, mine, optimizer, of_rank[rank])
        go(engine, mine, optimizer, steps[:4], 0)
        parts[rank] = (engine.state_dict(), mine.state_dict())

    def go(engine: Engine, mine: Any, optimizer: Any, changes: Any, start: int) -> None:
        for number, change in enumerate(changes, start):
            if change is not None:
                change(mine, optimizer)
            engine.backward(loss_of(mine, number, engine.group.rank, SIZE))
            engine.step()
            engine.zero_grad()

    def second(rank: int) -> None:
        mine = learner()
        mine.load_state_dict(parts[0][1])
        mine[0].requires_grad_(False)
        optimizer = make(mine)
        engine = commlab.strategy("dps", mine, optimizer, again[rank])
        engine.load_state_dict(*[part[0] for part in parts])
        go(engine, mine, optimizer, steps[4:], 4)
        for found, wanted in zip(mine.parameters(), model.parameters(), strict=True):
            assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-9)

    crew.all(first)
    crew.all(second)
