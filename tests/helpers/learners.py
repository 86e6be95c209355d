"""A model whose layers are frozen and trained in turn, on ranks that are threads, beside the same in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

SIZES = (7, 33, 17, 5)
"""Widths of the layers: chunks of ranks cut tensors anywhere."""
SAMPLES = 12
"""Per step, of all ranks together: divided evenly by 2, 3 and 4."""

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


def plain(make: Callable[[torch.nn.Module], torch.optim.Optimizer], steps: Sequence[Step | None]) -> Any:
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
