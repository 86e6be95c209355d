"""Models that are TorchScript, whole or in part, train as they do in Python, and what is done to them is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from coupled import SIZE, couple, every_strategy, make_step, model_of, two_groups
from crew import Crew, by_turns, groups

import commlab
from commlab.errors import UsageError
from commlab.strategies.engine import Engine
from commlab.strategies.structure import Structure

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # it is there, and still used


def in_part(model: torch.nn.Sequential) -> torch.nn.Module:
    model[0] = torch.jit.script(model[0])
    return model


def traced(model: torch.nn.Sequential) -> torch.nn.Module:
    model[2] = torch.jit.trace(model[2], torch.ones(2, 4))
    return model


@every_strategy
@pytest.mark.parametrize("script", [torch.jit.script, in_part, traced], ids=["whole", "a part", "a traced part"])
def test_it_trains_as_in_python(
    crew: Crew, strategy: str, script: Callable[[torch.nn.Sequential], torch.nn.Module]
) -> None:
    ends = []
    for make in (lambda model: model, script):
        ranks = groups(SIZE)

        def start(rank: int, make: Callable[..., torch.nn.Module] = make, ranks: list[commlab.Group] = ranks) -> Engine:
            with by_turns:
                model = make(model_of())
            return couple(strategy, model, two_groups(model), ranks[rank], max_grad_norm=1.0)

        engines = crew.all(start)
        for step in range(3):
            assert all(crew.all(lambda rank: make_step(engines[rank], rank, step)))  # noqa: B023 - called here
        ends.append([parameter.detach().clone() for parameter in engines[0].model.parameters()])
        crew.all(lambda rank: engines[rank].close())  # noqa: B023 - called here
    assert all(map(torch.equal, *ends))


def test_a_change_beneath_is_seen() -> None:
    model = in_part(model_of())
    structure = Structure(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert structure.same()
    model[0].weight.requires_grad_(False)
    assert not structure.same()
    structure.look()
    assert structure.same()
    model[0].weight = torch.nn.Parameter(torch.zeros(4, 3))
    assert not structure.same()
    structure.look()
    model[1] = torch.jit.script(torch.nn.Tanh())
    assert not structure.same()


def test_dedicated_servers_want_hooks(crew: Crew) -> None:
    ranks = groups(SIZE)

    def refused(rank: int) -> str:
        with by_turns:
            model = torch.jit.script(model_of())
        with pytest.raises(UsageError) as caught:
            commlab.strategy("ps", model, torch.optim.SGD(model.parameters(), lr=0.1), ranks[rank], servers=1)
        return str(caught.value)

    for text in crew.all(refused):
        assert "waits for parameters in hooks of the model, and one that is TorchScript takes none" in text
