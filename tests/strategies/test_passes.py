"""Backward passes of every kind that reach an engine's parameters: several losses, several engines, checkpointed
segments, hooks of the user's, compiled models."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from crew import Crew, crew_of, groups
from torch.utils.checkpoint import checkpoint
from training import alone

import commlab
from commlab.errors import CommlabError, UsageError
from commlab.runtime.group import Group
from commlab.strategies.engine import Engine

EVERY = ("single", "allreduce", "ps", "dps")
OURS = EVERY[1:]


crew = crew_of(2)


class Net(torch.nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairwise(widths))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.arange(1.0, parameter.numel() + 1).sin().view(parameter.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def couple(strategy: str, model: torch.nn.Module, group: Group | None = None, **options: Any) -> Engine:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return commlab.strategy(strategy, model, optimizer, group or alone(), **options)


def values(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1).clone() for parameter in model.parameters()])


X = torch.arange(1.0, 13).view(4, 3).cos()


@pytest.mark.parametrize("strategy", EVERY)
def test_two_losses_of_one_graph(strategy: str) -> None:
    """B6: the first inside no_sync(), with retain_graph=True."""
    model, twin = Net(3, 4, 2), Net(3, 4, 2)
    engine = couple(strategy, model, bucket_bytes=None if strategy == "single" else 1)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        hidden = model(X)
        with engine.no_sync():
            engine.backward(hidden.square().sum(), retain_graph=True)
        engine.backward(hidden.sum())
        engine.step()
        engine.zero_grad()
        optimizer.zero_grad()
        hidden = twin(X)
        (hidden.square().sum() + hidden.sum()).backward()
        optimizer.step()
    assert torch.allclose(values(model), values(twin), rtol=1e-5)


class Segments(Net):
    """One layer in two segments of activation checkpointing."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__(3, 3)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("strategy", OURS)
@pytest.mark.parametrize("reentrant, options", [(False, {}), (True, {"overlap": False}), (True, {})])
def test_a_weight_in_two_checkpointed_segments(strategy: str, reentrant: bool, options: dict[str, Any]) -> None:
    """B6: right, or one error with both ways out: a reentrant segment makes a gradient of its own, after the bucket may
    have left."""
    model, twin = Segments(reentrant), Segments(False)
    engine = couple(strategy, model, **options)
    x = X.clone().requires_grad_()
    if reentrant and not options:
        with pytest.raises(
            UsageError, match=r"'layers\.0\.\w+' is ready after its bucket.*use_reentrant=False.*overlap=F"
        ):
            engine.backward(model(x).square().sum())
        with pytest.raises(UsageError, match=r"ended in an exception.*zero_grad"):
            engine.backward(model(x).square().sum())
        engine.zero_grad()
        engine.backward(super(Segments, model).forward(x).sum())
        assert engine.step()
        return
    engine.backward(model(x).square().sum())
    engine.step()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(x).square().sum().backward()
    optimizer.step()
    assert torch.allclose(values(model), values(twin), rtol=1e-6)


@pytest.mark.parametrize("strategy", EVERY)
def test_a_gan_in_the_documented_order(crew: Crew, strategy: str) -> None:
    """B6: docs/strategies.md has the order: the generator's backward goes through the discriminator, whose zero_grad()
    drops what it has left there."""
    real = X[:, :2] + 1

    def train(name: str, group: Group) -> torch.Tensor:
        generator, discriminator = Net(3, 4, 2), Net(2, 5, 1)
        engines = couple(name, generator, group), couple(name, discriminator, group)
        for _ in range(3):
            fake = generator(X)
            engines[1].zero_grad()
            engines[1].backward(discriminator(fake.detach()).mean() - discriminator(real).mean())
            engines[1].step()
            engines[0].zero_grad()
            engines[0].backward(-discriminator(fake).mean())
            engines[0].step()
        return torch.cat([values(generator), values(discriminator)])

    def by_hand() -> torch.Tensor:
        models = Net(3, 4, 2), Net(2, 5, 1)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
        for _ in range(3):
            fake = models[0](X)
            optimizers[1].zero_grad()
            (models[1](fake.detach()).mean() - models[1](real).mean()).backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            (-models[1](fake).mean()).backward()
            optimizers[0].step()
        return torch.cat([values(model) for model in models])

    ranks = [alone()] if strategy == "single" else groups(2)
    found = [train(strategy, ranks[0])] if strategy == "single" else crew.all(lambda rank: train(strategy, ranks[rank]))
    for each in found:
        assert torch.allclose(each, by_hand(), rtol=1e-5)


@pytest.mark.parametrize("strategy", EVERY)
def test_gradients_of_another_backward_are_not_added_without_a_word(strategy: str) -> None:
    """B6: what another engine's backward has left says what to do; inside no_sync() it counts."""
    model = Net(3, 2)
    engine = couple(strategy, model)
    model(X).sum().backward()
    with pytest.raises(UsageError, match=r"has a gradient already, from another backward pass.*zero_grad.*no_sync"):
        engine.backward(model(X).sum())
    engine.zero_grad()
    with engine.no_sync():
        model(X).sum().backward()
    engine.backward(model(X).sum())
    engine.step()
    once = Net(3, 2)
    other = couple(strategy, once)
    other.backward(once(X).sum() * 2)
    other.step()
    assert torch.allclose(values(model), values(once), rtol=1e-6)


def test_a_backward_between_backward_and_step_is_refused() -> None:
    """B6: under allreduce it would add one rank's own gradient to the reduced one."""
    model = Net(3, 2)
    engine = couple("allreduce", model)
    engine.backward(model(X).sum())
    with pytest.raises(UsageError, match=r"not this engine's has added to the reduced gradient.*call step\(\) first"):
        model(X).sum().backward()


@pytest.mark.parametrize("strategy", EVERY)
def test_hooks_that_are_put_on_after_the_engine_edit_the_local_gradient(strategy: str) -> None:
    """B7: as under DDP, whose own hooks run after them too."""
    model, twin = Net(3, 4, 2), Net(3, 4, 2)
    engine = couple(strategy, model, bucket_bytes=None if strategy == "single" else 1)

    def halve(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(halve)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        engine.backward(model(X).sum())
        engine.step()
        engine.zero_grad()
        optimizer.zero_grad()
        (twin(X).sum() * 0.5).backward()
        optimizer.step()
    assert torch.allclose(values(model), values(twin), rtol=1e-6)


@pytest.mark.parametrize("strategy", OURS)
def test_hooks_that_take_gradients_away_are_named(strategy: str) -> None:
    """B7: an optimizer in a hook would train on this rank's gradient alone."""
    model = Net(3, 2)
    engine = couple(strategy, model)

    def take(parameter: torch.Tensor) -> None:
        parameter.grad = None

    model.layers[0].weight.register_post_accumulate_grad_hook(take)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"'layers\.0\.weight' was taken away during backward"):
        engine.backward(model(X).sum())


@pytest.mark.parametrize("strategy", EVERY)
def test_closures_are_refused_with_the_reason(strategy: str) -> None:
    """B7: LBFGS, and a closure of any optimizer."""
    model = Net(3, 2)
    message = "may need whole tensors" if strategy in ("ps", "dps") else "LBFGS wants a closure"
    with pytest.raises(UsageError, match=message):
        commlab.strategy(strategy, model, torch.optim.LBFGS(model.parameters()), alone())
    engine = couple(strategy, model)
    engine.backward(model(X).sum())
    with pytest.raises(UsageError, match=r"engine\.step\(\) takes no closure"):
        engine.step(lambda: model(X).sum())
    assert engine.step()


@pytest.mark.parametrize("strategy", EVERY)
def test_a_compiled_models_state_loads_without_compile_and_back(strategy: str) -> None:
    """B7: ``_orig_mod.`` is in no name."""
    plain, model = Net(3, 2), Net(3, 2)
    compiled = torch.compile(model, backend="eager")
    engines = couple(strategy, plain), couple(strategy, compiled)
    for engine in engines:
        engine.backward(engine.model(X).sum())
        engine.step()
        engine.zero_grad()
    assert engines[1].model is compiled
    assert [item.name for item in engines[1].parameters] == [item.name for item in engines[0].parameters]
    engines[0].load_state_dict(engines[1].state_dict())
    engines[1].load_state_dict(engines[0].state_dict())
    assert torch.equal(values(plain), values(model))


def test_sparse_gradients_where_nothing_is_reduced() -> None:
    """B7: SparseAdam works alone; dividing by a count is refused by name."""
    for counted in (False, True):
        model = torch.nn.Embedding(5, 3, sparse=True)
        engine = commlab.strategy("single", model, torch.optim.SparseAdam(model.parameters()), alone())
        before = model.weight.detach().clone()
        loss = model(torch.tensor([1, 2])).sum()
        if counted:
            with pytest.raises(UsageError, match="'weight' is sparse"):
                engine.backward(loss, 2)
            continue
        engine.backward(loss)
        engine.step()
        assert (model.weight != before).any(1).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("strategy", OURS)
def test_expanded_buffers_and_gradients(crew: Crew, strategy: str) -> None:
    """B7: an expanded buffer is rank 0's everywhere; a gradient of one's own that is expanded travels as any other."""
    ranks = groups(2)

    def train(rank: int) -> list[float]:
        model = Net(3, 2)
        model.register_buffer("mask", torch.full((1, 2), float(rank + 1)).expand(4, 2))
        engine = couple(strategy, model, ranks[rank])
        before = model.layers[0].bias.detach().clone()  # type: ignore[union-attr]
        with engine.no_sync():
            model.layers[0].bias.grad = torch.tensor([float(rank)]).expand(2)
        engine.backward(model.layers[0].weight.sum())  # type: ignore[union-attr,operator]
        engine.step()
        moved = before - model.layers[0].bias.detach()  # type: ignore[union-attr]
        return [float(model.mask.sum()), *moved.tolist()]  # type: ignore[operator,union-attr]

    for found in crew.all(train):
        assert found == pytest.approx([8.0, 0.05, 0.05], rel=1e-5)


@pytest.mark.parametrize("strategy", OURS)
def test_an_engine_goes_on_after_a_gradient_that_was_not_finite(crew: Crew, strategy: str) -> None:
    """B5: whether or not zero_grad() is called after the error."""
    ranks = groups(2)

    def train(rank: int) -> list[Any]:
        model = Net(3, 4, 2)
        engine = couple(strategy, model, ranks[rank], wire="fp16")
        before = values(model)
        found: list[Any] = []
        for factor, clears in ((1e9, False), (1e9, True), (1.0, False)):
            try:
                engine.backward(model(X + rank).sum() * factor)
                engine.step()
            except CommlabError as error:
                found.append("could not travel on wire fp16" in str(error) and torch.equal(values(model), before))
            if clears:
                engine.zero_grad()
        twin = Net(3, 4, 2)
        other = couple("single", twin)
        other.backward((twin(X).sum() + twin(X + 1).sum()) / 2)
        other.step()
        found.append(torch.allclose(values(model), values(twin), atol=1e-2) and not torch.equal(values(model), before))
        return [*found, engine.steps]

    assert crew.all(train) == [[True, True, True, 1]] * 2


def test_ddp_trains_the_users_own_model(crew: Crew) -> None:
    """A12: mode, state, parameters, attributes and forward hooks are the model's; parts of it can be called too."""
    ranks = groups(2)

    class Own(Net):
        def __init__(self) -> None:
            super().__init__(3, 4, 2)
            self.norm = torch.nn.BatchNorm1d(3)
            self.mark = "mine"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.nn.functional.dropout(self.norm(x), 0.5, self.training))

        def by_parts(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[1](self.layers[0](self.norm(x)))  # type: ignore[no-any-return]

    def train(rank: int) -> tuple[bytes, bool]:
        model = Own()
        engine = couple("ddp", model, ranks[rank])
        assert engine.model is model and engine.model.mark == "mine"
        assert list(engine.model.state_dict()) == list(Own().state_dict())
        calls: list[int] = []
        model.register_forward_hook(lambda *_: calls.append(1))
        for step in range(4):
            engine.model.train()
            if step == 2:
                with engine.no_sync():
                    engine.backward(engine.model(X - rank).square().mean())
            engine.backward((engine.model if step % 2 else engine.model.by_parts)(X + rank).square().mean())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            engine.step()
            engine.zero_grad()
            engine.model.eval()
            with torch.no_grad():
                if rank == 0:  # alone: nobody waits
                    assert torch.equal(engine.model(X), engine.model(X)), "no dropout"
        assert calls
        return values(model).numpy().tobytes(), torch.equal(values(model), values(Own()))

    found = crew.all(train)
    assert len({each for each, _ in found}) == 1 and not found[0][1]


def test_copies_of_a_model_under_ddp_have_no_engine() -> None:
    """A12, B8."""
    model = Net(3, 2)
    couple("ddp", model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))
