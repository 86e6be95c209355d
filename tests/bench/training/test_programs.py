"""Random training programs: what is drawn can be trained, and is the same on every rank."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from bench.training import programs, small_models
from bench.training.programs import draw

SEEDS = range(300)
DRAWN = [draw(seed, ranks) for ranks in (2, 3, 4) for seed in SEEDS]


def test_a_seed_names_a_program() -> None:
    """Also over JSON, in which a failed program is printed."""
    assert draw(7, 3) == draw(7, 3) != draw(8, 3)
    assert json.loads(json.dumps(draw(7, 3).record()))["seed"] == 7


def test_everything_is_drawn() -> None:
    """No kind of model, optimizer, scheduler, event or strategy is left out, whatever the combinations exclude."""
    events = Counter(event for program in DRAWN for step in program.steps for event in step.events)
    strategies = {(name, "servers" in options) for program in DRAWN for name, options in program.strategies}
    assert set(events) == set(programs.EVENTS)
    assert {program.model for program in DRAWN} == set(programs.MODELS)
    assert {program.optimizer for program in DRAWN} == set(programs.SMOOTH + programs.ADAPTIVE)
    assert {program.scheduler for program in DRAWN} == set(programs.SCHEDULERS)
    assert strategies == {
        *(("allreduce", False), ("dps", False), ("ps", False), ("ddp", False)),
        *(("ps", True), ("dps", True)),
    }
    assert {step.counted for program in DRAWN for step in program.steps} == {"mean", "count", "weights"}


def test_every_step_has_samples_of_somebody_who_trains() -> None:
    """A count of 0 has no mean; under servers the last ranks' samples are nobody's."""
    for program in DRAWN:
        fewest = min(program.trainers(phase) for phase in range(len(program.strategies)))
        for step in program.steps:
            assert len(step.samples) == program.ranks and fewest >= 1
            assert sum(map(sum, step.samples[:fewest])) > 0
            if step.counted == "mean":
                assert len({size for sizes in step.samples for size in sizes}) == 1


def test_sixteen_bits_only_where_errors_stay_small() -> None:
    for program in DRAWN:
        assert program.wire is None or (program.dtype == "float32" and program.optimizer in programs.SMOOTH)


@pytest.mark.parametrize("kind", programs.MODELS)
def test_models_use_their_samples(kind: str) -> None:
    """Two samples that differ give outputs that differ, and one seed gives one model."""
    model = small_models.make_model(kind, 3, torch.float64)
    again = small_models.make_model(kind, 3, torch.float64)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    x = small_models.samples(3, 0, 0, 0, 2, torch.float64)[0]
    x[1] = 1 - x[0]
    with torch.no_grad():
        found = model(x)
    assert found.shape == (2, small_models.WIDTH) and not torch.equal(found[0], found[1])


def test_samples_differ_by_every_argument() -> None:
    wanted = [(1, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1)]
    made = [small_models.samples(*each, 2, torch.float64) for each in wanted]
    assert len({float(each.sum()) for each in made}) == len(wanted)
