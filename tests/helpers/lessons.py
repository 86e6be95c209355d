"""A small model that learns something on all ranks of a group: every step's loss, parameters and update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import training

import commlab
from commlab.chunks import split
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group
from commlab.strategies.engine import Engine

STEPS, SAMPLES, WIDTH = 20, 24, 12


def learner() -> torch.nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 32), torch.nn.LayerNorm(32), torch.nn.GELU(), torch.nn.Linear(32, 4)
        )


def lesson(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and targets that can be learned from them."""
    inputs = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(step))
    return inputs, torch.stack([inputs[:, :3].sum(1), inputs[:, 3], inputs[:, 4] * 2, inputs[:, 5:7].mean(1)], 1)


Tamper = Callable[[torch.Tensor, int], torch.Tensor]


def taught(
    strategy: str,
    group: Group,
    skip: int | None = None,
    tamper: Tamper = lambda loss, step: loss,
    scale: float = 2.0**10,
    growth_interval: int = 2000,
    optimizer: str = "AdamW",
    **options: Any,
) -> tuple[Engine, list[float], list[bytes], list[bool]]:
    """The engine, each step's loss over all ranks, the parameters' digests, and whether there was an update.

    ``skip``: a step that is not taken at all, as if it had overflowed. ``tamper(loss, step)`` on this rank's loss.
    """
    model = learner()
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.02)
    engine = commlab.strategy(strategy, model, made, group, **options)
    loss_scale = engine.precision.loss_scale
    if loss_scale is not None:
        loss_scale.value, loss_scale.growth_interval = scale, growth_interval
    losses, digests, updates = [], [], []
    for step in range(STEPS):
        inputs, targets = lesson(step)
        own = split(SAMPLES, group.size)[group.rank]
        with engine.autocast():
            got = engine.model(inputs[own.start : own.stop])
            loss = (got.float() - targets[own.start : own.stop]).square().sum()
        losses.append(float(loss.detach()))
        if step == skip:
            assert loss_scale is not None
            loss_scale.update(True)
            updates.append(False)
        else:
            engine.backward(tamper(loss, step), own.numel, SAMPLES)
            updates.append(engine.step())
            engine.zero_grad()
        digests.append(training.digest(model))
    engine.close()
    rows = gather_bytes(group, torch.tensor(losses).numpy().tobytes(), "losses")
    total = torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float32) for row in rows]).sum(0) / SAMPLES
    same = gather_bytes(group, b"".join(digests), "digests")
    assert len(set(same)) == 1, "ranks have different parameters"
    return engine, total.tolist(), digests, updates
