"""16-bit wires: every number of a step's gradient within what rounding allows, the same bits on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import training
from mpi_ranks import Ranks
from mpi_strategies import EVERY_ALGORITHM, assert_same_bits_everywhere, groups_of, ours
from mpi_windows import close_all
from training import Recipe, reference, train

import commlab
from commlab.chunks import split
from commlab.runtime.group import Group

UNIT_ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8}
TINIEST = {"fp16": 2.0**-25, "bf16": 0.0}
"""Half the distance of the smallest fp16 numbers: the error of what is smaller than they."""

wires = pytest.mark.parametrize("wire", UNIT_ROUNDOFF)


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_all()


class KeepGradients(torch.optim.SGD):
    """Instead of updating parameters, replaces them by their gradients, so that all ranks see what an owner got."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for entry in self.param_groups:
            for parameter in entry["params"]:
                parameter.copy_(torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad)


def exchanged(strategy: str, group: Group, recipe: Recipe, **options: Any) -> dict[str, torch.Tensor]:
    """The gradient of the first step as the strategy gives it to the optimizer, by parameter."""
    model = training.make_model(recipe)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = commlab.strategy(
        strategy,
        model,
        KeepGradients(trained, lr=1.0),
        group,
        max_grad_norm=recipe.max_grad_norm,
        elementwise=True,
        **options,
    )
    training.backward(engine, recipe, 0)
    engine.step()
    engine.close()
    return {name: tensor for name, tensor in training.tensors(model).items() if name != "fixed"}


def contributions(recipe: Recipe, size: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The first step's gradient, and the sum over ranks of the absolute values of what they add to it, in float64."""
    gradient: dict[str, torch.Tensor] = {}
    absolute: dict[str, torch.Tensor] = {}
    inputs, targets = training.samples(0, recipe.samples[0])
    for own in split(len(inputs), size):
        model = training.make_model(recipe).double()
        errors = model(inputs[own.start : own.stop].double()) - targets[own.start : own.stop].double()
        (errors.square().sum() / len(inputs)).backward()
        for name, tensor in model.named_parameters():
            if tensor.grad is not None:
                gradient[name] = gradient.get(name, 0) + tensor.grad
                absolute[name] = absolute.get(name, 0) + tensor.grad.abs()
    return gradient, absolute


@ours
@wires
@pytest.mark.parametrize("algorithm", EVERY_ALGORITHM)
def test_every_number_is_within_its_rounding(ranks: Ranks, strategy: str, wire: str, algorithm: str) -> None:
    recipe = Recipe(all_used=True)
    for group in groups_of(ranks):
        found = exchanged(strategy, group, recipe, algorithm=algorithm, wire=wire)
        gradient, absolute = contributions(recipe, group.size)
        once = algorithm in ("window", "direct")
        # Window and direct: each contribution is rounded when it is packed; then the owner divides, in fp32. An
        # allreduce rounds what it gives back.
        # The others: packed, divided by P before they are added, and rounded at each of at most P - 1 additions.
        roundings = 1 + (strategy == "allreduce") if once else group.size + 1
        unit, tiniest = UNIT_ROUNDOFF[wire], TINIEST[wire]
        different = 0
        for name, tensor in gradient.items():
            limit = (
                absolute[name] * ((1 + unit) ** roundings - 1 + 1e-5)
                + tiniest * (group.size + 1)
                + 1e-6 * absolute[name].norm()
            )
            apart = (found[name].double() - tensor).abs()
            assert (apart <= limit).all(), (
                f"{group.size} ranks, {name}: off by {float((apart / limit).max()):.2f} of what is allowed"
            )
            different += int((apart > unit * absolute[name] / 16).sum())
        assert different > 50, "the wire was not used: nothing was rounded"


@ours
@wires
def test_clipping_does_not_round_again(ranks: Ranks, strategy: str, wire: str) -> None:
    """The clipped gradient is the wire's sum times the factor, rounded in the parameters' precision only."""
    for group in groups_of(ranks):
        for algorithm in ("window", "ring"):
            plain = exchanged(strategy, group, Recipe(all_used=True), algorithm=algorithm, wire=wire)
            clipped = exchanged(
                strategy, group, Recipe(all_used=True, max_grad_norm=0.37), algorithm=algorithm, wire=wire
            )
            norm = sum(float(tensor.double().square().sum()) for tensor in plain.values()) ** 0.5
            for name, tensor in plain.items():
                torch.testing.assert_close(clipped[name], tensor * (0.37 / (norm + 1e-6)), rtol=1e-6, atol=0)


@ours
@wires
@pytest.mark.parametrize("algorithm", ["window", "ring"])
def test_training_stays_close_and_ranks_equal(ranks: Ranks, strategy: str, wire: str, algorithm: str) -> None:
    recipe = Recipe(accumulation=2, max_grad_norm=0.5)
    for group in groups_of(ranks):
        run, again = (
            train(strategy, group, recipe, wire=wire, algorithm=algorithm, bucket_bytes=300) for _ in range(2)
        )
        assert run.digests == again.digests
        assert_same_bits_everywhere(run)
        worst, name = training.difference(training.tensors(run.model), training.tensors(reference(recipe).model))
        # Gradients are rounded P + 1 times at most; clipped to norm 0.5, they move a tensor by less than its own norm
        # in 5 steps.
        assert 0 < worst <= (group.size + 1) * 5 * UNIT_ROUNDOFF[wire], name


def test_a_wire_of_16_bits_carries_64_bit_models(ranks: Ranks) -> None:
    recipe = Recipe(dtype=torch.float64)
    for group in groups_of(ranks):
        run = train("dps", group, recipe, wire="fp16")
        assert run.model.gain.dtype == torch.float64
        assert_same_bits_everywhere(run)
