"""A model whose layers are frozen and trained in turn, on ranks that are threads, beside the same in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils import parametrize, prune

import commlab
from commlab.strategies.engine import Engine

SIZES = (7, 33, 17, 5)
"""Widths of the layers: chunks of ranks cut tensors anywhere."""
SAMPLES = 12
"""Per step, of all ranks together: divided evenly by 2, 3 and 4."""

Make = Callable[[torch.nn.Module], torch.optim.Optimizer]
"""Freezes what is frozen at first, and makes the optimizer."""
Step = Callable[[torch.nn.Module, torch.optim.Optimizer], object]
"""What a user does to the model and the optimizer before a step."""


def learner() -> torch.nn.Sequential:
    """Three layers in fp64, of closed-form values, distinct for every number: an order of additions changes results by
    1e-15, and Adam's quotients of it by no more than 1e-9."""
    model = torch.nn.Sequential(
        torch.nn.Linear(SIZES[0], SIZES[1]),
        torch.nn.Tanh(),
        torch.nn.Linear(SIZES[1], SIZES[2]),
        torch.nn.Tanh(),
        torch.nn.Linear(SIZES[2], SIZES[3]),
    ).double()
    with torch.no_grad():
        for at, parameter in enumerate(model.parameters()):
            parameter.copy_(
                (torch.arange(parameter.numel(), dtype=torch.float64) * (at + 1.7)).sin().view(parameter.shape) / 3
            )
    return model


def loss_of(model: torch.nn.Module, step: int, rank: int = 0, size: int = 1) -> torch.Tensor:
    """The mean loss of a rank's samples of a step; the mean over ranks is the loss of all samples."""
    each = SAMPLES // size
    inputs = (
        (torch.arange(SAMPLES * SIZES[0], dtype=torch.float64) * (0.37 + step))
        .cos()
        .view(SAMPLES, -1)[rank * each : (rank + 1) * each]
    )
    result: torch.Tensor = model(inputs).square().mean()
    return result


def plain(make: Make, steps: Sequence[Step | None]) -> Any:
    """The training in plain torch, on one rank. Returns model and optimizer."""
    model = learner()
    optimizer = make(model)
    for number, change in enumerate(steps):
        if change is not None:
            change(model, optimizer)
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()
    return model, optimizer


def state_by_name(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """What the optimizer remembers of each parameter of the model."""
    return {name: optimizer.state[tensor] for name, tensor in model.named_parameters() if tensor in optimizer.state}


def head_only(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The last layer is trained, the others are frozen and not the optimizer's."""
    model.requires_grad_(False)
    model[4].requires_grad_(True)
    return torch.optim.AdamW(model[4].parameters(), lr=0.02)


def everything(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [{"params": model[0].parameters()}, {"params": [*model[2].parameters(), *model[4].parameters()], "lr": 5e-3}],
        lr=0.02,
    )


def all_but_frozen(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer has everything, and the first layer is frozen."""
    model[0].requires_grad_(False)
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def unfreeze(layer: int) -> Step:
    def change(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model[layer].requires_grad_(True)
        optimizer.add_param_group({"params": list(model[layer].parameters()), "lr": 0.01})

    return change


def freeze(layer: int, frozen: bool = True) -> Step:
    return lambda model, optimizer: model[layer].requires_grad_(not frozen)


def remove_first_group(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(False)
    del optimizer.param_groups[0]


def rename(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    prune.custom_from_mask(model[2], "weight", torch.arange(17 * 33).view(17, 33).remainder(3) > 0)


def in_torchs_parametrization(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parametrize.register_parametrization(model[2], "weight", torch.nn.Hardtanh(-0.2, 0.2))


def replace_layer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A new last layer, in the place of the old one, in the optimizer too."""
    fresh = torch.nn.Linear(17, 5).double()
    with torch.no_grad():
        fresh.weight.copy_(torch.arange(85.0).cos().view(5, 17) / 4)
        fresh.bias.copy_(torch.arange(5.0).cos() / 4)
    model[4] = fresh
    del optimizer.param_groups[0]
    optimizer.add_param_group({"params": list(fresh.parameters()), "lr": 0.03})


CASES: dict[str, tuple[Make, Sequence[Step | None]]] = {
    "unfrozen and added": (head_only, [None, None, unfreeze(2), None, unfreeze(0), None]),
    "frozen, and trained again": (
        everything,
        [None, freeze(0), None, freeze(2), freeze(0, False), freeze(2, False), None],
    ),
    "removed and added again": (everything, [None, None, remove_first_group, None, unfreeze(0), None]),
    "held frozen from the start": (all_but_frozen, [None, None, freeze(0, False), None]),
    "renamed by prune": (everything, [None, rename, None]),
    "parametrized": (everything, [None, in_torchs_parametrization, None]),
    "another module in its place": (head_only, [None, replace_layer, None, unfreeze(2), None]),
}


def trained(group: Any, strategy: str, case: str, **options: Any) -> tuple[torch.nn.Module, Any, Engine]:
    make, steps = CASES[case]
    model = learner()
    optimizer = make(model)
    engine = commlab.strategy(strategy, model, optimizer, group, **options)
    for number, change in enumerate(steps):
        if change is not None:
            change(model, optimizer)
        engine.backward(loss_of(engine.model, number, group.rank, group.size))
        engine.step()
        engine.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
    return model, optimizer, engine


Trained = tuple[torch.nn.Module, torch.optim.Optimizer]


def assert_like(found: Trained, wanted: Trained) -> None:
    """Parameters, the optimizer's state and its groups, up to the order of additions."""
    for (name, mine), theirs in zip(found[0].named_parameters(), wanted[0].parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-9), name
    state, wanted_state = state_by_name(*found), state_by_name(*wanted)
    assert state.keys() == wanted_state.keys() and state
    for name, values in wanted_state.items():
        assert state[name].keys() == values.keys()
        for key, value in values.items():
            assert state[name][key].shape == value.shape
            assert torch.allclose(state[name][key], value, rtol=1e-7, atol=1e-12), f"{name} {key}"
    for entry, wanted_entry in zip(found[1].param_groups, wanted[1].param_groups, strict=True):
        assert [list(t.shape) for t in entry["params"]] == [list(t.shape) for t in wanted_entry["params"]]
        assert entry["lr"] == wanted_entry["lr"]
