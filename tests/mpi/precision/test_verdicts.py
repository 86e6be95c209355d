"""What all ranks must decide alike: whether a gradient is finite, whether to autocast, and which precision it is."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
import training
from mpi_ranks import Ranks
from mpi_strategies import ours
from mpi_windows import close_all, few_ranks

import commlab
from commlab.errors import DisagreementError
from commlab.native.dtypes import WIRES
from commlab.runtime.control import gather_bytes

WORST = (math.inf, -math.inf, math.nan, 65504.0, 65520.0, 1e6, 3e38, -3e38)
NUMELS = (3, 40, 1, 700)


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_all()


@ours
@pytest.mark.parametrize("wire", [None, "fp16", "bf16"])
def test_any_gradients_are_judged_alike(ranks: Ranks, strategy: str, wire: str | None) -> None:
    """60 steps in a row of gradients with the worst numbers anywhere on any rank. Drawn from one seed on all ranks."""
    for group in few_ranks(ranks):
        draw = random.Random(11 + group.size)
        model = torch.nn.ParameterList([torch.full((numel,), 2.0) for numel in NUMELS])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        engine = commlab.strategy(
            strategy,
            model,
            optimizer,
            group,
            precision="fp16",
            autocast="off",
            wire=wire,
            bucket_bytes=170,
            max_grad_norm=draw.choice((None, 1.0)),
        )
        loss_scale = engine.precision.loss_scale
        assert loss_scale is not None
        decisions, wanted = [], []
        for step in range(60):
            loss_scale.value = 2.0 ** draw.randrange(8)
            everyone = torch.randn(group.size, sum(NUMELS), generator=torch.Generator().manual_seed(step))
            for _ in range(draw.choice((0, 0, 1, 3))):
                everyone[draw.randrange(group.size), draw.randrange(sum(NUMELS))] = draw.choice(WORST)
            packed = everyone * loss_scale.value
            packed = packed if wire is None else packed.to(WIRES[wire])
            # The squares of what is beyond 2^63 do not fit fp32.
            sound = packed.isfinite().all() and packed.float().abs().sum(0).max() < 2.0**60
            wanted.append(bool(sound))
            before = training.digest(model)
            gradients = everyone[group.rank].split(NUMELS)
            engine.backward(sum((p * gradient).sum() for p, gradient in zip(model, gradients, strict=True)))
            decisions.append(engine.step())
            engine.zero_grad()
            assert (training.digest(model) != before) is decisions[-1]
        assert decisions == wanted
        assert 10 < decisions.count(True) < 50
        assert engine.skipped_steps == decisions.count(False)
        assert all(parameter.isfinite().all() for parameter in model)
        everyones = gather_bytes(group, bytes(decisions) + training.digest(model), "decisions")
        assert len(set(everyones)) == 1
        engine.close()


def test_all_ranks_decide_alike_on_autocast(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """On where 16-bit products are faster on all ranks; one where they are slow switches it off for all."""
    from commlab.precision import modes

    for group in few_ranks(ranks):
        for slow_rank, casts in ((None, True), (0, False), (group.size - 1, False)):
            monkeypatch.setattr(modes, "_slowdown", lambda *_: 3.0 if group.rank == slow_rank else 0.5)  # noqa: B023
            made = modes.Precision("bf16", "auto", torch.device("cpu"), group)
            assert made.casts is casts
            assert made.reason == (
                f"16-bit products take {3 if group.rank == slow_rank else 0.5} times as long as fp32 ones here: "
                f"autocast {'on' if casts else 'off'}"
            )


def test_ranks_of_different_precisions_are_told(ranks: Ranks) -> None:
    for group in [ranks.subgroup([0, 1, 2])]:  # of its own: its ranks part ways in the middle of an operation
        if group is not None:
            model = torch.nn.Linear(3, 3)
            with pytest.raises(
                DisagreementError, match="different options: precision, rank 0: 'fp32', ranks 1, 2: 'bf16'"
            ):
                commlab.strategy(
                    "dps",
                    model,
                    torch.optim.SGD(model.parameters(), lr=0.1),
                    group,
                    precision="bf16" if group.rank else "fp32",
                )
