"""Whatever is in the gradients, all ranks skip a step or none does: 1,000 generated steps on three ranks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import training
from crew import Crew, crew_of, groups
from hypothesis import given, settings
from hypothesis import strategies as st

import commlab
from commlab.runtime.group import Group
from commlab.strategies.engine import Engine

SIZE = 3
NUMELS = (3, 40, 1, 70)
TOTAL = sum(NUMELS)
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
EXAMPLES = 1000


@dataclass
class Job:
    """One strategy and wire on all ranks."""

    wire: str | None
    engines: list[Engine]


def parameters() -> torch.nn.ParameterList:
    return torch.nn.ParameterList([torch.full((numel,), 2.0) for numel in NUMELS])


def engine_of(strategy: str, wire: str | None, clip: float | None, group: Group) -> Engine:
    model = parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    options: dict[str, Any] = {"precision": "fp16", "autocast": "off", "wire": wire, "max_grad_norm": clip}
    return commlab.strategy(strategy, model, optimizer, group, bucket_bytes=170, **options)


crew = crew_of(SIZE)


@pytest.fixture(scope="module")
def jobs(crew: Crew) -> list[Job]:
    found = []
    combinations = itertools.product(("allreduce", "ps", "dps"), (None, "fp16", "bf16"))
    for (strategy, wire), clip in zip(combinations, itertools.cycle((None, 1.0))):
        ranks = groups(SIZE)
        engines = crew.all(lambda rank: engine_of(strategy, wire, clip, ranks[rank]))  # noqa: B023 - called here
        found.append(Job(wire, engines))
    return found


BAD = st.sampled_from([torch.inf, -torch.inf, torch.nan, 65504.0, 65519.0, 65520.0, 1e6, 3.4e38, -3.4e38])
PLACES = st.tuples(st.integers(0, SIZE - 1), st.integers(0, TOTAL - 1), BAD | st.floats(width=32))


def expected(everyone: torch.Tensor, scale: float, wire: str | None) -> bool | None:
    """Whether the step counts: all that any rank packs is finite. None where it is, but the sum over ranks, or of the
    squares, may not be."""
    packed = everyone * scale
    packed = packed if wire is None else packed.to(HALVES[wire])
    if not packed.isfinite().all():
        return False
    return None if float(packed.double().abs().sum(0).max()) > 2.0**56 else True


seen = {True: 0, False: 0}


@settings(max_examples=EXAMPLES)
@given(data=st.data(), seed=st.integers(0, 2**16), bad=st.lists(PLACES, max_size=3), exponent=st.integers(0, 12))
def test_all_ranks_decide_alike(
    crew: Crew, jobs: list[Job], data: st.DataObject, seed: int, bad: list[tuple[int, int, float]], exponent: int
) -> None:
    job = data.draw(st.sampled_from(jobs))
    everyone = torch.randn(SIZE, TOTAL, generator=torch.Generator().manual_seed(seed))
    for rank, index, number in bad:
        everyone[rank, index] = number

    def step(rank: int) -> tuple[bool, bytes, bytes, float, int]:
        engine = job.engines[rank]
        assert engine.precision.loss_scale is not None
        engine.precision.loss_scale.value = 2.0**exponent
        with torch.no_grad():
            for parameter in engine.model.parameters():
                parameter.fill_(2.0)
        before = training.digest(engine.model)
        gradients = everyone[rank].split(NUMELS)
        engine.backward(sum((p * g).sum() for p, g in zip(engine.model.parameters(), gradients, strict=True)))
        updated = engine.step()
        engine.zero_grad()
        return updated, before, training.digest(engine.model), engine.precision.scale, engine.skipped_steps

    found = crew.all(step)
    assert len(set(found)) == 1, "ranks decided differently, or have different parameters, scales or counters"
    updated, before, after, scale, _ = found[0]
    wanted = expected(everyone, 2.0**exponent, job.wire)
    assert wanted is None or updated is wanted
    assert (before != after) is updated
    assert scale == (2.0**exponent if updated else max(1.0, 2.0 ** (exponent - 1)))
    seen[updated] += 1


def test_both_decisions_were_seen() -> None:
    """Of the steps above, in this process."""
    if sum(seen.values()):
        assert min(seen.values()) > EXAMPLES / 10, seen
