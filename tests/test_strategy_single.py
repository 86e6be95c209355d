"""``single`` against torch by hand, the other strategies on one rank, and the engine's contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import training
from training import EVEN, Net, Recipe, alone, assert_same, build, go_on, reference, samples, train

import commlab
from commlab.collectives.group import Group
from commlab.errors import UsageError
from commlab.strategies import STRATEGIES
from commlab.strategies.base import Strategy, norm_squared
from commlab.topology import Topology
from commlab.transport.sim import SimNetwork

OURS = ("allreduce", "ps", "dps")
RECIPES = (
    Recipe(),
    Recipe(accumulation=3, max_grad_norm=0.5),
    Recipe(total_known=False, max_grad_norm=1e6),
    Recipe(samples=EVEN, counted=False, accumulation=2),
    Recipe(dtype=torch.float64, max_grad_norm=0.5),
    Recipe(optimizer="Adagrad"),
)


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


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
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
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
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
    assert all(parameter.grad is None for parameter in run.model.parameters()), "a gradient is on its way, not here"
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


# The engine's contract. One rank is enough: all of it is found before anything is sent.

CONTRACT = ("single", *OURS)


def small(strategy: str, **options: Any) -> tuple[Strategy, torch.nn.Linear]:
    model = torch.nn.Linear(3, 2)
    return commlab.strategy(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), alone(), **options), model


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    result: torch.Tensor = model(torch.ones(4, 3)).square().sum()
    return result


@pytest.mark.parametrize("strategy", CONTRACT)
def test_second_backward_of_a_step_is_refused_and_the_step_survives(strategy: str) -> None:
    engine, model = small(strategy)
    engine.backward(loss_of(model))
    with pytest.raises(UsageError, match=r"second backward\(\) in one step.*no_sync"):
        engine.backward(loss_of(model))
    engine.step()
    assert engine.steps == 1


@pytest.mark.parametrize("strategy", CONTRACT)
def test_step_needs_a_backward_that_syncs(strategy: str) -> None:
    engine, model = small(strategy)
    with pytest.raises(UsageError, match=r"step\(\) without a backward\(\) outside no_sync"):
        engine.step()
    with engine.no_sync():
        engine.backward(loss_of(model))
    with pytest.raises(UsageError, match=r"step\(\) without a backward\(\) outside no_sync"):
        engine.step()
    engine.backward(loss_of(model))
    engine.step()
    with pytest.raises(UsageError, match="without a backward"):
        engine.step()


@pytest.mark.parametrize("strategy", ["single", "allreduce"])
def test_missing_zero_grad_is_noticed(strategy: str) -> None:
    engine, model = small(strategy)
    engine.backward(loss_of(model))
    engine.step()
    with pytest.raises(UsageError, match=r"engine\.zero_grad\(\) after engine\.step\(\)"):
        engine.backward(loss_of(model))
    engine.zero_grad()
    engine.backward(loss_of(model))


@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_servers_need_no_zero_grad(strategy: str) -> None:
    engine, model = small(strategy)
    twin_engine, twin = small("single")
    twin.load_state_dict(model.state_dict())
    for _ in range(3):
        engine.backward(loss_of(model))
        engine.step()
        twin_engine.backward(loss_of(twin))
        twin_engine.step()
        twin_engine.zero_grad()
    assert torch.allclose(model.weight, twin.weight, rtol=1e-6)


@pytest.mark.parametrize("strategy", CONTRACT)
def test_zero_grad_drops_what_was_accumulated_and_is_refused_in_between(strategy: str) -> None:
    engine, model = small(strategy)
    twin_engine, twin = small(strategy)
    twin.load_state_dict(model.state_dict())
    with engine.no_sync():
        engine.backward(loss_of(model), 1000)
    engine.zero_grad()
    for each, net in ((engine, model), (twin_engine, twin)):
        each.backward(loss_of(net), 4)
    with pytest.raises(UsageError, match=r"zero_grad\(\) between backward\(\) and step\(\)"):
        engine.zero_grad()
    for each in (engine, twin_engine):
        each.step()
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("strategy", CONTRACT)
@pytest.mark.parametrize("first, second", [(4, None), (None, 4)])
def test_counts_are_given_always_or_never(strategy: str, first: int | None, second: int | None) -> None:
    engine, model = small(strategy)
    with engine.no_sync():
        engine.backward(loss_of(model), first)
    with pytest.raises(UsageError, match="either every backward.. call is given a count, or none"):
        engine.backward(loss_of(model), second)


@pytest.mark.parametrize("strategy", CONTRACT)
@pytest.mark.parametrize("count", [None, 3])
def test_no_loss_needs_a_count_of_zero(strategy: str, count: int | None) -> None:
    engine, _ = small(strategy)
    with pytest.raises(UsageError, match="count=0"):
        engine.backward(None, count)


@pytest.mark.parametrize("strategy", CONTRACT)
def test_a_step_without_any_sample_changes_nothing(strategy: str) -> None:
    model = torch.nn.Linear(3, 2)
    engine = commlab.strategy(
        strategy, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5), alone(), max_grad_norm=1.0
    )
    engine.backward(loss_of(model), 4)
    engine.step()
    engine.zero_grad()
    before = model.weight.detach().clone()
    engine.backward(None, 0)
    engine.step()
    assert torch.equal(model.weight, before) and engine.grad_norm == 0


@pytest.mark.parametrize("strategy", CONTRACT)
def test_an_exception_inside_no_sync_does_not_leave_it_on(strategy: str) -> None:
    engine, model = small(strategy)
    with pytest.raises(KeyError), engine.no_sync():
        raise KeyError
    engine.backward(loss_of(model))
    engine.step()


@pytest.mark.parametrize(
    "strategy, options, message",
    [
        ("zero", {}, "unknown strategy 'zero'; there are single, ps, dps, allreduce, ddp"),
        ("dps", {"wires": "fp16"}, "unknown option 'wires' for a strategy; there are algorithm, precision, wire, max_grad_norm"),
        ("dps", {"wire": "fp8"}, "unknown wire 'fp8'; there are none, fp16, bf16"),
        ("dps", {"precision": "int4"}, "unknown precision 'int4'; there is fp32"),
        ("ps", {"algorithm": "star"}, "unknown algorithm 'star'; there are auto, ring, halving, tree, direct"),
        ("allreduce", {"max_grad_norm": -1.0}, "max_grad_norm must be positive, not -1.0"),
        ("allreduce", {"max_grad_norm": 0}, "max_grad_norm must be positive, not 0"),
        ("ddp", {"wire": "fp16"}, "strategy ddp sends gradients as they are"),
    ],
)
def test_what_does_not_exist_is_named_at_once(strategy: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small(strategy, **options)


def test_single_is_for_one_rank() -> None:
    group = Group(SimNetwork(3).transports()[1], Topology(((0, 1, 2),)))
    model = torch.nn.Linear(3, 2)
    with pytest.raises(UsageError, match="strategy single trains on one rank, and this job has 3"):
        commlab.strategy("single", model, torch.optim.SGD(model.parameters(), lr=0.1), group)


@pytest.mark.parametrize("strategy", CONTRACT)
def test_the_optimizer_must_have_the_models_parameters(strategy: str) -> None:
    model = torch.nn.Linear(3, 2)
    with pytest.raises(UsageError, match="'bias' is trainable, but the optimizer does not have it"):
        commlab.strategy(strategy, model, torch.optim.SGD([model.weight], lr=0.1), alone())


class Signed(torch.optim.Optimizer):
    """Element-wise, but of the user's own."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for entry in self.param_groups:
            for parameter in entry["params"]:
                if parameter.grad is not None:
                    parameter -= entry["lr"] * parameter.grad.sign()


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS, Signed])
@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_servers_refuse_optimizers_that_may_need_whole_tensors(
    strategy: str, make: Callable[..., torch.optim.Optimizer]
) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.parameters())
    before = list(optimizer.param_groups[0]["params"])
    with pytest.raises(UsageError, match=rf"optimizer {make.__name__} may need whole tensors.*elementwise=True.*allreduce"):
        commlab.strategy(strategy, model, optimizer, alone())
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], before, strict=True)), "left as it was"


@pytest.mark.parametrize("strategy, options", [("ps", {"elementwise": True}), ("dps", {"elementwise": True}), ("allreduce", {})])
def test_an_optimizer_of_ones_own_runs_where_it_is_declared_elementwise(strategy: str, options: dict[str, Any]) -> None:
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    engine = commlab.strategy(strategy, model, Signed(model.parameters()), alone(), **options)
    engine.backward(model(torch.ones(1, 3)).sum() * 7)
    engine.step()
    assert torch.allclose(model.weight, before - 0.1)


@pytest.mark.parametrize("strategy", OURS)
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_fused_optimizers_get_gradients_laid_out_as_their_parameters(strategy: str, kind: str) -> None:
    """torch's fused loops walk parameter and gradient as plain memory, whatever their strides."""

    def run(name: str) -> torch.Tensor:
        model = torch.nn.Conv2d(4, 3, 2).to(memory_format=torch.channels_last)
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
        return model.weight.detach()

    assert torch.allclose(run(strategy), run("single"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_a_parameter_that_was_moved_is_named(strategy: str) -> None:
    engine, model = small(strategy)
    model.bias.data = model.bias.data.clone()
    engine.backward(loss_of(model))
    with pytest.raises(UsageError, match="parameter 'bias' was given other memory after"):
        engine.step()


@pytest.mark.parametrize("strategy", CONTRACT)
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
