"""An engine's claim on model and optimizer: what is refused while it lasts, and what comes back when it ends."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crew import Crew, crew_of, groups
from learners import assert_like, learner, loss_of, plain
from training import alone, digest

import commlab
from commlab.errors import UsageError
from commlab.strategies.engine import Engine

SIZE = 3
OURS = ("allreduce", "ps", "dps")
EVERY = ("single", *OURS)


crew = crew_of(SIZE)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    return torch.optim.AdamW([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 3e-3}], lr=0.02)


def momentum(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(reversed(list(model.parameters())), lr=0.1, momentum=0.9)


def one(strategy: str) -> tuple[Engine, torch.nn.Module, torch.optim.Optimizer]:
    model = learner()
    optimizer = adamw(model)
    return commlab.strategy(strategy, model, optimizer, alone()), model, optimizer


def steps(engine: Engine, numbers: range) -> None:
    group = engine.group
    for number in numbers:
        engine.backward(loss_of(engine.model, number, group.rank, group.size))
        engine.step()
        engine.zero_grad()


@pytest.mark.parametrize("make", [adamw, momentum])
@pytest.mark.parametrize("strategy", OURS)
def test_training_goes_on_in_plain_torch_after_close(crew: Crew, strategy: str, make: Callable[..., Any]) -> None:
    """A13: model and optimizer come back whole, state merged; hooks are gone, memory is the model's own."""
    of_rank = groups(SIZE)
    model, optimizer = plain(make, [None] * 6)

    def run(rank: int) -> None:
        mine = learner()
        own = make(mine)
        before = [list(entry["params"]) for entry in own.param_groups]
        engine = commlab.strategy(strategy, mine, own, of_rank[rank], bucket_bytes=900)
        steps(engine, range(3))
        engine.close()
        engine.close()
        for entry, tensors in zip(own.param_groups, before, strict=True):
            assert all(a is b for a, b in zip(entry["params"], tensors, strict=True))
        for number in range(3, 6):
            own.zero_grad()
            loss_of(mine, number).backward()
            own.step()
        assert_like((mine, own), (model, optimizer))
        twin = make(learner())
        twin.load_state_dict(own.state_dict())
        assert copy.deepcopy(own).param_groups[0]["lr"] == own.param_groups[0]["lr"]

    crew.all(run)


@pytest.mark.parametrize("first, second", [("dps", "allreduce"), ("allreduce", "ps"), ("ps", "dps"), ("dps", "dps")])
def test_training_goes_on_under_another_strategy(crew: Crew, first: str, second: str) -> None:
    """A13: a second engine takes over where the first one was closed."""
    once, again = groups(SIZE), groups(SIZE)
    model, optimizer = plain(adamw, [None] * 6)

    def run(rank: int) -> bytes:
        mine = learner()
        own = adamw(mine)
        engine = commlab.strategy(first, mine, own, once[rank], bucket_bytes=500)
        steps(engine, range(3))
        engine.close()
        engine = commlab.strategy(second, mine, own, again[rank])
        steps(engine, range(3, 6))
        found = digest(mine)
        engine.close()
        assert_like((mine, own), (model, optimizer))
        return found

    assert len(set(crew.all(run))) == 1


@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_state_can_be_dropped_at_the_end(crew: Crew, strategy: str) -> None:
    """A13: without the allgather; an optimizer that has forgotten everything refuses to step."""
    of_rank = groups(SIZE)

    def run(rank: int) -> None:
        mine = learner()
        own = adamw(mine)
        engine = commlab.strategy(strategy, mine, own, of_rank[rank])
        steps(engine, range(2))
        engine.close(state=False)
        assert not own.state
        assert all(a is b for a, b in zip(own.param_groups[0]["params"], mine.parameters(), strict=False))
        with pytest.raises(UsageError, match=r"dropped by engine\.close\(state=False\)"):
            own.step()

    crew.all(run)


@pytest.mark.parametrize("strategy", EVERY)
def test_every_call_on_a_closed_engine_says_so(strategy: str) -> None:
    """A13: a clear error instead of a step that trains nothing."""
    engine, model, _ = one(strategy)
    state = engine.state_dict()
    engine.close()
    calls: list[Callable[[], object]] = [
        lambda: engine.backward(loss_of(model, 0)),
        engine.step,
        engine.zero_grad,
        engine.settle,
        engine.state_dict,
        engine.serving_report,
        lambda: engine.load_state_dict(state),
        lambda: engine.update_parameters(lambda _: None),
        lambda: engine.turns(0, 1),
        lambda: engine.no_sync().__enter__(),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"\(\) on an engine that was closed"):
            call()


@pytest.mark.parametrize("second", EVERY)
@pytest.mark.parametrize("first", EVERY)
def test_a_second_engine_is_refused_until_the_first_is_closed(first: str, second: str) -> None:
    """A13: on the same optimizer, and with another optimizer on the same parameters; nothing is changed by it."""
    engine, model, optimizer = one(first)
    before = [list(entry["params"]) for entry in optimizer.param_groups]
    with pytest.raises(UsageError, match=rf"driven by an engine of strategy {first}|not trainable ones of the model"):
        commlab.strategy(second, model, optimizer, alone())
    with pytest.raises(UsageError, match=rf"parameter '0\.weight' is trained by an engine of strategy {first} already"):
        commlab.strategy(second, model, adamw(model), alone())
    assert all(
        a is b for e, t in zip(optimizer.param_groups, before, strict=True) for a, b in zip(e["params"], t, strict=True)
    )
    steps(engine, range(1))
    engine.close()
    commlab.strategy(second, model, optimizer, alone()).close()


@pytest.mark.parametrize("strategy", EVERY)
def test_a_model_that_is_wrapped_already_is_refused(strategy: str) -> None:
    """A13: DataParallel, whole or inside, exchanges gradients too."""
    model = torch.nn.Sequential(torch.nn.DataParallel(torch.nn.Linear(3, 2)))
    with pytest.raises(UsageError, match="the model has a DataParallel, which exchanges gradients itself"):
        commlab.strategy(strategy, model, torch.optim.SGD(model.parameters(), lr=1.0), alone())


@pytest.mark.parametrize("strategy", EVERY)
def test_two_optimizers_train_their_parts_of_one_model(crew: Crew, strategy: str) -> None:
    """A13, B7: two engines with partial=True, as two optimizers in torch."""
    size = 1 if strategy == "single" else SIZE
    of_rank = groups(size)

    def parts(model: Any) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        return torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(others, lr=0.01)

    model = learner()
    torchs = parts(model)
    for number in range(4):
        for optimizer in torchs:
            model.zero_grad()
            loss_of(model, number).backward()
            optimizer.step()

    def run(rank: int) -> bytes:
        if rank >= size:
            return b""
        mine = learner()
        engines = [commlab.strategy(strategy, mine, own, of_rank[rank], partial=True) for own in parts(mine)]
        for number in range(4):
            for engine, other in (engines, engines[::-1]):
                with other.no_sync():
                    engine.backward(loss_of(mine, number, rank, size))
                engine.step()
                engine.zero_grad()
                other.zero_grad()
        for found, wanted in zip(mine.parameters(), model.parameters(), strict=True):
            assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-9)
        found = digest(mine)
        for engine in engines:
            engine.close()
        return found

    assert len({found for found in crew.all(run) if found}) == 1


@pytest.mark.parametrize("strategy", EVERY)
def test_the_optimizers_own_step_is_refused(strategy: str) -> None:
    """A5: it would step on gradients that nobody has agreed on."""
    engine, model, optimizer = one(strategy)
    engine.backward(loss_of(model, 0))
    with pytest.raises(UsageError, match=rf"optimizer\.step\(\).*engine of strategy {strategy}.*engine\.step\(\)"):
        optimizer.step()
    engine.step()


@pytest.mark.parametrize("strategy", EVERY)
def test_the_optimizers_zero_grad_is_the_engines(strategy: str) -> None:
    """A5: also what was accumulated inside no_sync() is dropped."""
    engine, model, optimizer = one(strategy)
    twin_engine, twin, _ = one(strategy)
    with engine.no_sync():
        engine.backward(loss_of(model, 5) * 100)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    steps(engine, range(1))
    steps(twin_engine, range(1))
    assert digest(model) == digest(twin)


@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_the_optimizers_state_is_refused_where_it_is_pieces(strategy: str) -> None:
    """A5: state_dict, load_state_dict, deepcopy and pickle of an optimizer that holds pieces."""
    engine, _, optimizer = one(strategy)
    saved = adamw(learner()).state_dict()
    for call, name in (
        (optimizer.state_dict, r"state_dict\(\)"),
        (lambda: optimizer.load_state_dict(saved), r"load_state_dict\(\)"),
        (lambda: copy.deepcopy(optimizer), "a copy"),
        (lambda: pickle.dumps(optimizer), "a copy"),
        (lambda: torch.save(optimizer, io.BytesIO()), "a copy"),
    ):
        with pytest.raises(UsageError, match=rf"{name} of an optimizer that an engine of strategy {strategy} drives"):
            call()  # type: ignore[operator]
    steps(engine, range(1))
    engine.close()
    assert optimizer.state_dict()["state"][0]["exp_avg"].shape == (33, 7)


@pytest.mark.parametrize("strategy", ["single", "allreduce"])
def test_the_optimizers_state_is_right_where_it_is_whole(crew: Crew, strategy: str) -> None:
    """A5: saved and loaded by torch's own calls, on every rank, as if never stopped."""
    size = 1 if strategy == "single" else SIZE
    first, second = groups(size), groups(size)
    model, optimizer = plain(adamw, [None] * 4)

    def run(rank: int) -> None:
        if rank < size:
            mine, again = learner(), learner()
            own, owns = adamw(mine), adamw(again)
            engine = commlab.strategy(strategy, mine, own, first[rank])
            steps(engine, range(2))
            resumed = commlab.strategy(strategy, again, owns, second[rank])
            again.load_state_dict(mine.state_dict())
            owns.load_state_dict(copy.deepcopy(own.state_dict()))
            steps(resumed, range(2, 4))
            assert_like((again, owns), (model, optimizer))

    crew.all(run)
