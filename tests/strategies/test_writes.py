"""Writes that autograd or an engine does not make: graphs that live across a step, parameters that users or optimizers
write between two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from crew import Crew, crew_of, groups
from training import alone

import commlab
from commlab.errors import CommlabError, DisagreementError, UsageError
from commlab.runtime.group import Group
from commlab.strategies.engine import Engine

OURS = ("allreduce", "ps", "dps")
SIZE = 2


crew = crew_of(SIZE)


def small(strategy: str, group: Group, *, width: int = 3, **options: Any) -> Engine:
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Linear(width, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(1.0, parameter.numel() + 1).sin().view(parameter.shape))
    optimizer = options.pop("optimizer", lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    return commlab.strategy(strategy, model, optimizer(model.parameters()), group, **options)


def loss_of(engine: Engine, rank: int = 0) -> torch.Tensor:
    result: torch.Tensor = engine.model(torch.arange(1.0, 7).view(2, 3) + rank).square().mean()
    return result


def make_step(engine: Engine, rank: int = 0) -> None:
    engine.backward(loss_of(engine, rank))
    engine.step()
    engine.zero_grad()


def values(engine: Engine) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1).clone() for parameter in engine.model.parameters()])


def outcomes(crew: Crew, task: Callable[[int], Any]) -> list[Any]:
    """What ``task(rank)`` returns on every rank, or the error that it raises."""

    def run(rank: int) -> Any:
        try:
            return task(rank)
        except (CommlabError, RuntimeError) as error:
            return error

    return crew.all(run)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("strategy", ["single", *OURS])
def test_a_graph_that_lives_across_a_step_raises_torchs_error(crew: Crew, strategy: str, fused: bool) -> None:
    """A9: a delayed backward would use weights of another step than its activations; on every rank, also on those that
    do not update the parameter."""

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, fused=fused)

    def delayed(engine: Engine, rank: int) -> str:
        late = loss_of(engine, rank)
        make_step(engine, rank)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()
        make_step(engine, rank) if engine.model[1].weight.grad is None else engine.zero_grad()
        return "raised"

    if strategy == "single":
        assert delayed(small(strategy, alone(), optimizer=adam), 0)
        return
    ranks = groups(SIZE)
    engines = crew.all(lambda rank: small(strategy, ranks[rank], optimizer=adam))
    assert crew.all(lambda rank: delayed(engines[rank], rank)) == ["raised"] * SIZE


@pytest.mark.parametrize("strategy", OURS)
def test_a_parameter_that_no_step_writes_may_be_saved_across_it(crew: Crew, strategy: str) -> None:
    """A9: torch raises for what was overwritten alone."""
    ranks = groups(SIZE)

    def run(rank: int) -> float:
        model = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = commlab.strategy(strategy, model, optimizer, ranks[rank])
        x = torch.ones(1, 3, requires_grad=True)
        late = model[1](x).sum()
        engine.backward(model[0](x.detach()).sum())
        engine.step()
        engine.zero_grad()
        late.backward()
        assert x.grad is not None
        return float((x.grad - model[1].weight.detach().sum(0)).abs().max())

    assert crew.all(run) == [0.0] * SIZE


def test_collectives_on_saved_activations_raise_torchs_error(crew: Crew) -> None:
    """A9: in every operation that writes its tensor; where it is left as it was, backward goes on."""
    ranks = groups(SIZE)

    def run(rank: int) -> list[bool]:
        found = []
        for operation in (
            lambda t: commlab.allreduce(t, group=ranks[rank]),
            lambda t: commlab.allreduce_async(t, group=ranks[rank]).wait(),
            lambda t: commlab.broadcast(t, root=0, group=ranks[rank]),
            lambda t: commlab.reduce(t, root=0, group=ranks[rank]),
            lambda t: commlab.allgather(t, torch.ones(2), group=ranks[rank]),
            lambda t: commlab.reduce_scatter(t, torch.ones(8), group=ranks[rank]),
        ):
            x = torch.ones(4, requires_grad=True)
            saved = x * 2
            loss = saved.square().sum()
            operation(saved.detach())  # shares the memory, as the data of an activation do
            try:
                loss.backward()
                found.append(False)
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                found.append(True)
        return found

    assert crew.all(run) == [[True, True, False, True, True, True], [True, True, True, False, True, True]]


def multiply(engine: Engine, _: int) -> None:
    with torch.no_grad():
        engine.model[0].weight.mul_(0.5)


def multiply_by_rank(engine: Engine, rank: int) -> None:
    with torch.no_grad():
        engine.model[1].bias.mul_(0.5 + rank)


@pytest.mark.parametrize("strategy", OURS)
def test_writes_of_ones_own_count_where_they_are_alike(crew: Crew, strategy: str) -> None:
    """A9: ranks that have parameters of their own may write them, all in the same way, as under DDP."""
    ranks = groups(SIZE)

    def run(rank: int) -> torch.Tensor:
        engine = small(strategy, ranks[rank])
        for _ in range(2):
            make_step(engine, 0)
            multiply(engine, rank)
        return values(engine)

    twin = small("single", alone())
    for _ in range(2):
        make_step(twin)
        multiply(twin, 0)
    for found in crew.all(run):
        assert torch.allclose(found, values(twin), rtol=1e-6)


@pytest.mark.parametrize("strategy", OURS)
def test_writes_that_differ_between_ranks_are_named(crew: Crew, strategy: str) -> None:
    """A9, A4: in the next step, on all ranks, and nothing is updated."""
    ranks = groups(SIZE)
    engines = crew.all(lambda rank: small(strategy, ranks[rank]))
    crew.all(lambda rank: make_step(engines[rank]))
    crew.all(lambda rank: multiply_by_rank(engines[rank], rank))
    before = [values(engine) for engine in engines]
    for error in outcomes(crew, lambda rank: make_step(engines[rank])):
        assert isinstance(error, DisagreementError)
        assert "parameter '1.bias' was written between two steps, and not alike" in str(error)
        assert "update_parameters" in str(error)
    assert all(torch.equal(values(engine), mine) for engine, mine in zip(engines, before, strict=True))


def test_an_embedding_with_max_norm_is_seen(crew: Crew) -> None:
    """A9: forward writes the rows that it reads, other ones on each rank."""
    ranks = groups(SIZE)

    def run(rank: int) -> None:
        model = torch.nn.Embedding(4, 3, max_norm=0.1)
        engine = commlab.strategy("dps", model, torch.optim.SGD(model.parameters(), lr=0.1), ranks[rank])
        engine.backward(model(torch.tensor([rank])).sum())
        engine.step()

    for error in outcomes(crew, run):
        assert isinstance(error, DisagreementError) and "'weight' was written between two steps" in str(error)


class Averaging(torch.optim.SGD):
    """As schedule-free optimizers do: eval() puts averages into the parameters, train() takes them out again."""

    @torch.no_grad()
    def swap(self, *, quietly: bool = False) -> None:
        for entry in self.param_groups:
            for parameter in entry["params"]:
                state = self.state[parameter]
                other = state.get("average", torch.full_like(parameter, 0.25))
                state["average"] = parameter.detach().clone()
                (parameter.data if quietly else parameter).copy_(other)


@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_an_optimizer_that_writes_outside_of_its_step_is_agreed_on_or_refused(crew: Crew, strategy: str) -> None:
    """A15: settle() brings the write to all ranks; without it the next step says so."""
    ranks = groups(SIZE)
    engines = crew.all(
        lambda rank: small(strategy, ranks[rank], optimizer=lambda p: Averaging(p, lr=0.1), elementwise=True)
    )
    crew.all(lambda rank: make_step(engines[rank]))
    before = values(engines[0])

    def swap(rank: int) -> torch.Tensor:
        engines[rank].optimizer.swap()  # type: ignore[attr-defined]
        engines[rank].settle()
        return values(engines[rank])

    for found in crew.all(swap):
        assert (found == 0.25).all(), "the averages of all ranks' pieces"
    for found in crew.all(swap):
        assert torch.equal(found, before)
    crew.all(lambda rank: make_step(engines[rank]))
    crew.all(lambda rank: engines[rank].optimizer.swap())  # type: ignore[attr-defined]
    for error in outcomes(crew, lambda rank: make_step(engines[rank])):
        assert isinstance(error, UsageError) and "outside of the optimizer's step" in str(error)
        assert "engine.settle()" in str(error)


class Lookahead(torch.optim.Optimizer):
    """A wrapper, of the kind that has tensors beside the optimizer's state."""

    def __init__(self, inner: torch.optim.Optimizer, *, keeps: bool, shares: bool):
        self.optimizer = inner
        self.param_groups = inner.param_groups if shares else [dict(entry) for entry in inner.param_groups]
        self.state, self.defaults = inner.state, inner.defaults
        if keeps:
            self.slow = [[p.detach().clone() for p in entry["params"]] for entry in self.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()


@pytest.mark.parametrize(
    "keeps, shares, message",
    [
        (True, True, r"keeps tensors of its own in \.slow"),
        (False, False, r"an optimizer with groups or state of its own in \.optimizer"),
        (False, True, ""),
    ],
)
def test_wrappers_that_keep_whole_tensors_are_refused(keeps: bool, shares: bool, message: str) -> None:
    """A15: their copies would stay whole while the optimizer has pieces."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        return Lookahead(torch.optim.SGD(parameters, lr=0.1), keeps=keeps, shares=shares)

    if message:
        with pytest.raises(UsageError, match=message):
            small("dps", alone(), optimizer=make, elementwise=True)
        return
    engine, twin = small("dps", alone(), optimizer=make, elementwise=True), small("single", alone(), optimizer=make)
    for each in (engine, twin):
        make_step(each)
        make_step(each)
    assert torch.allclose(values(engine), values(twin), rtol=1e-6)
