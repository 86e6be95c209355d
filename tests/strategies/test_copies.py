"""What every rank has a copy of: given from rank 0 at the start, and compared from then on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coupled import SIZE, batch, build, couple, errors_of, every_strategy, make_step, model_of, two_groups, values
from crew import Crew, groups
from every_dtype import assert_alike, bits

from commlab.errors import DisagreementError, UsageError
from commlab.strategies.engine import Engine


def trained(kind: Callable[..., Any], steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = model_of(1)
    optimizer = two_groups(model, kind)
    for step in range(steps):
        model(batch(7, step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.param_groups[1]["lr"] = 0.037
    return model, optimizer


def adamw_amsgrad(groups_of: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_of, lr=lr, amsgrad=True)


def adamw_fused(groups_of: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_of, lr=torch.tensor(lr), fused=True)


KINDS = [torch.optim.AdamW, adamw_amsgrad, adamw_fused, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Rprop]


@every_strategy
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_rank_0_has_is_given(crew: Crew, strategy: str, kind: Callable[..., Any]) -> None:
    """A4: rank 0 alone has loaded a checkpoint before strategy(): model, optimizer, learning rate."""
    ranks = groups(SIZE)

    def one(rank: int, everybody: bool) -> list[torch.Tensor]:
        model, optimizer = trained(kind) if everybody or rank == 0 else trained(kind, 0)
        if not everybody and rank:
            optimizer.param_groups[0]["lr"] = 0.5
            optimizer = two_groups(model, kind)
        engine = couple(strategy, model, optimizer, again[rank] if everybody else ranks[rank], max_grad_norm=1.0)
        for step in range(3):
            make_step(engine, rank, step)
        engine.settle()
        return [*values(engine), torch.tensor(float(optimizer.param_groups[1]["lr"]))]

    given = crew.all(lambda rank: one(rank, False))
    again = groups(SIZE)
    wanted = crew.all(lambda rank: one(rank, True))
    for mine, theirs in zip(given, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_state_that_only_another_rank_has_is_dropped(crew: Crew) -> None:
    """A4: rank 0 starts anew, and a rank has the state of an earlier run."""
    ranks = groups(SIZE)

    def one(rank: int) -> int:
        model, optimizer = trained(torch.optim.AdamW, 2 * (rank == 1))
        couple("allreduce", model, optimizer, ranks[rank])
        return len(optimizer.state)

    assert crew.all(one) == [0] * SIZE


class Odd:
    """What no other rank could be told."""


def test_state_that_cannot_be_described_is_refused_by_name(crew: Crew) -> None:
    """A4: an object of the user's own in the optimizer's state."""
    ranks = groups(SIZE)

    def one(rank: int) -> None:
        model, optimizer = trained(torch.optim.AdamW)
        if rank == 2:
            optimizer.state[model[0].bias]["plan"] = Odd()
        with pytest.raises(UsageError, match=r"AdamW remembers 'plan' of '0.bias' as a Odd, which cannot be given"):
            couple("allreduce", model, optimizer, ranks[rank])

    crew.all(one)


def write_parameter(engine: Engine) -> None:
    with torch.no_grad():
        engine.model[2].weight[1, 1] += 1e-7


def load_model(engine: Engine) -> None:
    state = copy.deepcopy(engine.model.state_dict())
    state["2.weight"][0, 0] += 1
    engine.model.load_state_dict(state)


def load_optimizer(engine: Engine) -> None:
    state = copy.deepcopy(engine.optimizer.state_dict())
    state["state"][0]["exp_avg"][0, 0] += 1
    engine.optimizer.load_state_dict(state)


def write_state(engine: Engine) -> None:
    engine.optimizer.state[engine.model[0].weight]["exp_avg_sq"].mul_(2)


COPIES = {
    write_parameter: "'2.weight'",
    load_model: "'2.weight'",
    load_optimizer: "the optimizer's 'exp_avg' of '0.weight'",
    write_state: "the optimizer's 'exp_avg_sq' of '0.weight'",
}


@pytest.mark.parametrize("write", COPIES)
@pytest.mark.parametrize("strategy", ["allreduce", "external"])
def test_copies_that_differ_are_named(crew: Crew, strategy: str, write: Callable[[Engine], None]) -> None:
    """A4: rank 1 alone loads, or writes, after strategy(): in the next step, in settle(), every K steps."""
    for steps, meet in ((100, "settle"), (100, "step"), (2, "steps")):
        engines = build(crew, strategy, check_replicas=steps)
        crew.all(lambda rank: make_step(engines[rank], rank, 0))  # noqa: B023 - called here
        write(engines[1])
        if meet == "step" and write is write_state:
            continue  # nobody sees that before the next comparison

        def go_on(rank: int) -> None:
            engines[rank].settle() if meet == "settle" else make_step(engines[rank], rank, 1)  # noqa: B023

        told = errors_of(crew, go_on)
        for text in told:
            if "between two steps" in text:  # seen before there is anything to compare
                assert "not alike on all ranks: ranks 1 differ from 0, 2" in text and write is not write_state, text
                continue
            assert COPIES[write] in text and "(ranks 0, 2: copy 1, rank 1: copy 2)" in text, text


@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_copies_of_parameters_that_differ_are_named_under_servers(crew: Crew, strategy: str) -> None:
    """A4: between nodes every rank has parameters of its own."""
    engines = build(crew, strategy)
    crew.all(lambda rank: make_step(engines[rank], rank, 0))
    write_parameter(engines[1])
    told = errors_of(crew, lambda rank: engines[rank].settle())
    assert all("'2.weight' (ranks 0, 2: copy 1, rank 1: copy 2)" in text for text in told), told


@every_strategy
def test_writes_that_all_ranks_make_are_no_disagreement(crew: Crew, strategy: str) -> None:
    """A4: weights that are clipped after each step, as in WGAN."""
    engines = build(crew, strategy)

    def clipped(rank: int, step: int) -> None:
        make_step(engines[rank], rank, step)
        with torch.no_grad():
            for parameter in engines[rank].model.parameters():
                parameter.clamp_(-0.25, 0.25)

    for step in range(6):
        crew.all(lambda rank: clipped(rank, step))  # noqa: B023 - called here
    crew.all(lambda rank: engines[rank].settle())


@every_strategy
def test_random_changes_are_rank_0s(crew: Crew, strategy: str) -> None:
    """A10: update_parameters() with random numbers: parameters, frozen ones, and buffers."""
    ranks = groups(SIZE)

    def one(rank: int) -> dict[str, bytes]:
        model = model_of()
        model.register_buffer("noise", torch.zeros(5, dtype=torch.int16))
        model[2].bias.requires_grad_(False)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine = couple(strategy, model, torch.optim.AdamW(trainable, lr=0.1), ranks[rank])
        make_step(engine, rank, 0)

        def change(net: torch.nn.Module) -> None:
            generator = torch.Generator().manual_seed(rank)
            for parameter in net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
            net.noise.random_(1, 1000, generator=generator)

        engine.update_parameters(change)
        found = bits(model)
        make_step(engine, rank, 1)
        engine.settle()
        return found

    found = crew.all(one)
    assert_alike(found)
    assert any(found[0]["noise"])


def test_models_of_different_layouts_are_found(crew: Crew) -> None:
    """A4: as many numbers in another shape."""
    ranks = groups(SIZE)

    def one(rank: int) -> None:
        model = torch.nn.Linear(*((3, 2) if rank else (2, 3)), bias=False)
        with pytest.raises(DisagreementError, match=r"rank 0: .*'weight \[3, 2\]'.*; ranks 1-2: .*'weight \[2, 3\]'"):
            couple("dps", model, torch.optim.SGD(model.parameters(), lr=0.1), ranks[rank])

    crew.all(one)


@pytest.mark.parametrize("strategy", ["allreduce", "dps"])
def test_ranks_may_have_a_parameter_in_other_strides(crew: Crew, strategy: str) -> None:
    """A4: a transposed parameter, which one rank has made contiguous (as an engine does that was closed)."""
    of_rank = groups(SIZE)

    def run(rank: int) -> torch.Tensor:
        model = torch.nn.Linear(3, 5)
        turned = torch.arange(15.0).view(3, 5).add(rank).t()
        model.weight = torch.nn.Parameter(turned.contiguous() if rank == 1 else turned)
        engine = couple(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), of_rank[rank])
        engine.close()
        return model.weight.detach().clone()

    for found in crew.all(run):
        assert torch.equal(found, torch.arange(15.0).view(3, 5).t())
