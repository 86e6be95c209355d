"""A random program through commlab: plain torch's numbers, and every other number is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import alone

from bench.training import plain
from bench.training.fuzzed import Difference, Fuzzed
from bench.training.programs import TrainingProgram, draw


def program(**changes: object) -> TrainingProgram:
    """A program of one rank, without events."""
    made = draw(5, 1)
    steps = tuple(replace(step, events=()) for step in made.steps)
    changed: TrainingProgram = replace(
        made, model="mlp", optimizer="AdamW", dtype="float64", scheduler=None, max_grad_norm=1.0, steps=steps, **changes
    )
    return replace(changed, strategies=(("allreduce", {"bucket_bytes": 64}),))


def test_plain_torchs_numbers(tmp_path: Path) -> None:
    Fuzzed(program(), alone(), tmp_path).run()


@pytest.mark.parametrize("fault", ["parameter", "gradient", "state"])
def test_other_numbers_are_seen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By how much a fault is seen: one part in a million of one number."""
    fuzzed = Fuzzed(program(), alone(), tmp_path)
    if fault == "state":
        monkeypatch.setattr(fuzzed, "_compare", lambda when: None)
        weight = fuzzed.model.get_parameter("0.weight")
        close = fuzzed.engine.close

        def closed() -> None:
            close()
            fuzzed.optimizer.state[weight]["exp_avg"][0, 0] += 1e-6

        monkeypatch.setattr(fuzzed.engine, "close", closed)
    else:
        step = fuzzed.engine.step

        def stepped() -> bool:
            found = step()
            with torch.no_grad():
                fuzzed.model.get_parameter("0.weight")[0, 0] += 1e-6 * (fault == "parameter")
            fuzzed.engine.grad_norm = (fuzzed.engine.grad_norm or 0) * (1 + 1e-4 * (fault == "gradient"))
            return found

        monkeypatch.setattr(fuzzed.engine, "step", stepped)
    with pytest.raises(Difference):
        fuzzed.run()


def test_the_plain_run_divides_once_by_the_count() -> None:
    """Three samples weighed by no whole numbers, on two ranks in ragged micro-batches, are one batch."""
    made = draw(11, 2)
    step = replace(made.steps[0], events=(), samples=((1, 0), (2,)), counted="weights")
    made = replace(made, model="mlp", optimizer="SGD", dtype="float64", max_grad_norm=None, steps=(step,), groups=1)
    found = plain.PlainTraining(made)
    before = {name: tensor.detach().clone() for name, tensor in found.model.named_parameters()}
    losses = [plain.loss_of(found.model, made, 0, rank, 0) for rank in (0, 1)]
    whole = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    gradients = torch.autograd.grad(whole, list(found.model.parameters()))
    found.step(0, 2)
    for (name, tensor), gradient in zip(found.model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(tensor, before[name] - 0.05 * gradient, rtol=1e-12, atol=1e-14)
