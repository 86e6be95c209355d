"""``single`` against torch by hand, the other strategies on one rank, and the engine's contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import training
from training import EVEN, Net, Recipe, alone, assert_same, build, go_on, reference, samples, train

import commlab
from commlab.gradients.absent import AbsentGradient
from commlab.native.norm import norm_squared
from commlab.strategies import STRATEGIES
from commlab.strategies.protocol import Strategy

OURS = ("allreduce", "ps", "dps")
RECIPES = {
    "plain": Recipe(),
    "clipped, accumulated": Recipe(accumulation=3, max_grad_norm=0.5),
    "counts summed": Recipe(total_known=False, max_grad_norm=1e6),
    "no counts": Recipe(samples=EVEN, counted=False, accumulation=2),
    "fp64": Recipe(dtype=torch.float64, max_grad_norm=0.5),
    "Adagrad": Recipe(optimizer="Adagrad"),
}

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def by_hand(recipe: Recipe) -> tuple[Net, list[float]]:
    """The same training in plain torch: no engine, no micro-batches. Returns the model and the gradient norms."""
    model = training.make_model(recipe)
    optimizer = training.make_optimizer(model, recipe)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    norms = []
    for step, count in enumerate(recipe.samples):
        inputs, targets = samples(step, count)
        errors = model(inputs.to(recipe.dtype)) - targets.to(recipe.dtype)
        (errors.square().sum() / count).backward()
        limit = torch.inf if recipe.max_grad_norm is None else recipe.max_grad_norm
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model, norms


@recipes
def test_single_is_what_torch_does(recipe: Recipe) -> None:
    model, norms = by_hand(recipe)
    run = reference(recipe)
    worst, name = training.difference(training.tensors(run.model), training.tensors(model))
    assert worst <= 1e-6, f"{name} differs by {worst:.1e}"
    if recipe.max_grad_norm is None:
        assert run.norms == [None] * len(norms)
    else:
        assert [norm for norm in run.norms if norm is not None] == pytest.approx(norms, rel=1e-5)
    # None of this would say anything if training had changed nothing.
    after = training.tensors(run.model)
    for name, before in training.tensors(training.make_model(recipe)).items():
        if name.startswith(("spare", "fixed", "empty")):
            assert torch.equal(after[name], before)
        else:
            assert training.difference({name: after[name]}, {name: before})[0] > 1e-3


@pytest.mark.parametrize("strategy", OURS)
@recipes
def test_one_rank_trains_like_single(strategy: str, recipe: Recipe) -> None:
    for bucket_bytes in (1, 300, 10**9):
        assert_same(train(strategy, alone(), recipe, bucket_bytes=bucket_bytes), reference(recipe), 1e-6)


@pytest.mark.parametrize("strategy", ["single", "allreduce"])
def test_gradients_stay_after_step_where_the_strategy_keeps_them(strategy: str) -> None:
    run = build(strategy, alone(), Recipe(max_grad_norm=0.01))
    training.backward(run.engine, run.recipe, 0)
    run.engine.step()
    gradients = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
    assert norm_squared(gradients) ** 0.5 == pytest.approx(0.01, rel=1e-4), "clipped"
    run.engine.zero_grad()
    assert all(parameter.grad is None for parameter in run.model.parameters())


@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_servers_leave_no_gradients(strategy: str) -> None:
    run = build(strategy, alone(), Recipe())
    training.backward(run.engine, run.recipe, 0)
    assert all(isinstance(item.tensor.grad, AbsentGradient) for item in run.engine.parameters), "on its way, not here"
    run.engine.step()
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_the_norm_of_a_large_gradient_is_exact() -> None:
    # Added up in fp32 alone this would be wrong by 1e-4, and by another amount for each way of cutting the gradient.
    numbers = torch.rand(3_000_001, generator=torch.Generator().manual_seed(1))
    wanted = float(numbers.double().square().sum())
    assert norm_squared([numbers]) == pytest.approx(wanted, rel=1e-7)
    assert norm_squared([numbers[:1_000_000], numbers[1_000_000:].view(-1, 3)]) == pytest.approx(wanted, rel=1e-7)
    assert norm_squared([numbers[:4096], torch.empty(0), numbers[4096:5000]]) == pytest.approx(
        float(numbers[:5000].double().square().sum()), rel=1e-7
    )
    wide = numbers[:9999].double() * 1e100
    assert norm_squared([wide]) == pytest.approx(float(wide.square().sum()), rel=1e-14), "fp64 stays fp64"


@pytest.mark.parametrize("strategy", OURS)
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_fused_optimizers_get_gradients_laid_out_as_their_parameters(strategy: str, kind: str) -> None:
    """torch's fused loops walk parameter and gradient as plain memory, whatever their strides."""

    def run(name: str) -> torch.Tensor:
        model = torch.nn.Conv2d(4, 3, 2)
        model.weight.data = model.weight.data.to(memory_format=torch.channels_last)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.arange(parameter.numel()).sin().view(parameter.shape))
        make: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, kind)
        engine = commlab.strategy(name, model, make(model.parameters(), lr=0.1, fused=True), alone())
        for step in range(3):
            image = torch.arange(64.0).add(step).cos().view(1, 4, 4, 4)
            engine.backward(model(image).square().sum())
            engine.step()
            engine.zero_grad()
        weight: torch.Tensor = model.weight.detach()
        return weight

    assert torch.allclose(run(strategy), run("single"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["single", *OURS])
def test_saved_and_loaded_as_if_never_stopped(strategy: str) -> None:
    recipe = Recipe(optimizer="AdamW", max_grad_norm=0.5)
    first = go_on(build(strategy, alone(), recipe), range(3))
    saved, scheduler, model = first.engine.state_dict(), first.scheduler.state_dict(), training.make_model(recipe)
    model.load_state_dict(first.model.state_dict())
    resumed = build(strategy, alone(), recipe, model)
    resumed.engine.load_state_dict(saved)
    resumed.scheduler.load_state_dict(scheduler)
    assert resumed.engine.steps == 3
    go_on(first, range(3, 5))
    go_on(resumed, range(3, 5))
    assert first.digests[3:] == resumed.digests, "bit for bit"


def test_every_strategy_of_the_table_can_be_imported() -> None:
    from importlib import import_module

    for module, kind in STRATEGIES.values():
        assert issubclass(getattr(import_module(f"commlab.strategies.{module}"), kind), Strategy)
