"""A model's buffers: rank 0's at the start, and by the rule of the options from then on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from coupled import SIZE, batch, couple, every_strategy, make_step, model_of, two_groups
from crew import Crew, by_turns, groups
from every_dtype import DTYPES, assert_alike, bits, of_dtype, quantized

from commlab.errors import UsageError
from commlab.strategies.engine import Engine


class Everything(torch.nn.Module):
    """Buffers of every dtype, other numbers for every seed; some of them not contiguous, and one not saved."""

    def __init__(self, seed: int):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.frozen = torch.nn.Parameter(torch.full((3,), float(seed)), requires_grad=False)
        for at, dtype in enumerate(DTYPES):
            self.register_buffer(f"b{at}", of_dtype(dtype, seed))
        for at, tensor in enumerate(quantized(seed)):
            self.register_buffer(f"q{at}", tensor)
        self.register_buffer("turned", torch.arange(6.0).add(seed).view(2, 3).t())
        self.register_buffer("masked", torch.arange(4.0).add(seed), persistent=False)
        self.register_buffer("nothing", torch.empty(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(x)
        return found


@pytest.mark.filterwarnings("ignore")
@every_strategy
def test_every_rank_starts_with_rank_0s_buffers(crew: Crew, strategy: str) -> None:
    """A6: buffers of every dtype are given; A4: a parameter that is frozen too."""
    ranks = groups(SIZE)

    def one(rank: int) -> dict[str, bytes]:
        with by_turns:
            model = Everything(rank)
        engine = couple(strategy, model, torch.optim.SGD(model.layer.parameters(), lr=0.1), ranks[rank])
        make_step(engine, rank, 0)
        engine.settle()
        return bits(model)

    found = crew.all(one)
    assert_alike(found)
    first = bits(Everything(0))
    assert all(found[0][name] == first[name] for name in first if not name.startswith("layer"))


def test_a_sparse_buffer_is_refused_by_name(crew: Crew) -> None:
    """A6: what cannot be given is named, on every rank."""
    ranks = groups(SIZE)

    def one(rank: int) -> None:
        model = torch.nn.Linear(2, 2)
        model.register_buffer("graph", torch.eye(2).to_sparse() if rank == 1 else torch.eye(2))
        with pytest.raises(UsageError, match=r"'graph' is a sparse_coo tensor.*on ranks 1 of 3"):
            couple("allreduce", model, torch.optim.SGD(model.parameters(), lr=0.1), ranks[rank])

    crew.all(one)


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.eye(4, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(self.layer(x))
        return found


def normed(crew: Crew, strategy: str, **options: Any) -> list[Engine]:
    ranks = groups(SIZE)

    def one(rank: int) -> Engine:
        model = Normed()
        with torch.no_grad():
            model.layer.weight.copy_(torch.arange(12.0).sin().view(4, 3))
            model.layer.bias.fill_(0.25)
        return couple(strategy, model, torch.optim.SGD(model.parameters(), lr=0.0), ranks[rank], **options)

    return crew.all(one)


def statistics(engine: Engine) -> tuple[torch.Tensor, torch.Tensor, int]:
    norm = engine.model.norm
    return norm.running_mean.clone(), norm.running_var.clone(), int(norm.num_batches_tracked)


def alone(rank: int, steps: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The statistics of a rank that nobody tells anything."""
    model = Normed()
    with torch.no_grad():
        model.layer.weight.copy_(torch.arange(12.0).sin().view(4, 3))
        model.layer.bias.fill_(0.25)
        for step in range(steps):
            model(batch(rank, step))
    return model.norm.running_mean, model.norm.running_var, steps


@every_strategy
@pytest.mark.parametrize("rule", ["broadcast", "mean", "local"])
def test_statistics_follow_the_rule(crew: Crew, strategy: str, rule: str) -> None:
    """A6: BatchNorm's running statistics, after each step and in settle()."""
    engines = normed(crew, strategy, buffers=rule)
    for step in range(3):
        crew.all(lambda rank: make_step(engines[rank], rank, step))  # noqa: B023 - called here
        found = [statistics(engine) for engine in engines]
        # Learning rate 0: the running statistics are linear in those of the batches.
        wanted = [alone(rank, step + 1) for rank in range(SIZE)]
        for rank in range(SIZE):
            for at in (0, 1):
                if rule == "mean":
                    expected = torch.stack([each[at] for each in wanted]).mean(0)
                else:
                    expected = wanted[0 if rule == "broadcast" else rank][at]
                assert torch.allclose(found[rank][at], expected, rtol=1e-5, atol=1e-6), (step, rank, at)
            assert found[rank][2] == step + 1
    # A forward pass in between, without a step.
    crew.all(lambda rank: engines[rank].model(batch(rank, 9)))
    crew.all(lambda rank: engines[rank].settle())
    same = [torch.equal(statistics(engine)[0], statistics(engines[0])[0]) for engine in engines]
    assert same == ([True] * SIZE if rule != "local" else [True, False, False])


@every_strategy
def test_a_rank_without_samples_follows_too(crew: Crew, strategy: str) -> None:
    """A6: rank 0 has no forward pass in the step, or is the only one that has."""
    for alone_rank in (0, 2):
        engines = normed(crew, strategy)

        def step(rank: int) -> None:
            has = (rank == alone_rank) == (alone_rank == 0)  # noqa: B023 - called here
            engine = engines[rank]  # noqa: B023
            engine.backward(engine.model(batch(rank, 0)).sum() if has else None, 2 * has)
            engine.step()
            engine.zero_grad()

        if strategy == "external" and alone_rank == 2:
            continue
        crew.all(step)
        assert_alike([statistics(engine)[2] for engine in engines])
        assert_alike([statistics(engine)[0].tolist() for engine in engines])


def test_buffers_that_nobody_writes_cost_no_message(crew: Crew) -> None:
    """A6: a model with masks, and one without buffers, send as many messages."""
    sent = []
    for masks in (0, 70):
        ranks = groups(SIZE)

        def one(rank: int) -> Engine:
            model = model_of()
            for at in range(masks):  # noqa: B023 - called here
                model.register_buffer(f"mask{at}", torch.ones(2, dtype=torch.bool))
            return couple("allreduce", model, two_groups(model), ranks[rank])  # noqa: B023

        engines = crew.all(one)
        before = len(ranks[0].transport._network.messages)  # type: ignore[attr-defined]
        crew.all(lambda rank: make_step(engines[rank], rank, 0))  # noqa: B023
        sent.append(len(ranks[0].transport._network.messages) - before)  # type: ignore[attr-defined]
        if masks:
            # With more buffers than bits neighbours share one: the last one is made alike, and the first one stays.
            engines[1].model.mask69.fill_(False)
            engines[0].model.mask68.fill_(False)
            crew.all(lambda rank: make_step(engines[rank], rank, 1))  # noqa: B023
            for engine in engines:
                assert not engine.model.mask68.any() and engine.model.mask69.all() and engine.model.mask0.all()
    assert sent[0] == sent[1]
