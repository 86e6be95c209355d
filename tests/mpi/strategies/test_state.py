"""Optimizer state: it exists once where it is sharded, and moves between strategies and numbers of ranks."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import training
from mpi_ranks import Ranks
from mpi_strategies import OURS, assert_same_bits_everywhere, groups_of, ours
from mpi_windows import GROUPS, close_all, window_group
from training import RAGGED, Recipe, Run, assert_same, build, go_on, reference

import commlab
from commlab.errors import DisagreementError
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group

STOP = 3
"""Steps before the stop; a scheduler step and ranks without samples lie on both sides of it."""


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_all()


def state_numel(run: Run) -> int:
    """How many numbers of state the optimizer holds, step counters aside (they are one per piece)."""
    found = 0
    for tensor, state in run.optimizer.state.items():
        sizes = {key: value.numel() for key, value in state.items() if torch.is_tensor(value) and key != "step"}
        assert set(sizes.values()) <= {tensor.numel()}
        found += sum(sizes.values())
    return found


@ours
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_state_exists_once_under_servers(ranks: Ranks, strategy: str, optimizer: str) -> None:
    recipe = Recipe(optimizer=optimizer)
    wanted = state_numel(reference(recipe))
    assert wanted > 100
    for group in groups_of(ranks):
        run = go_on(build(strategy, group, recipe), range(len(recipe.samples)))
        mine = state_numel(run)
        run.engine.close()
        everyones = [int(row) for row in gather_bytes(group, str(mine).encode(), "state numel")]
        if strategy == "allreduce":
            assert everyones == [wanted] * group.size
        elif strategy == "ps":
            assert everyones == [wanted] + [0] * (group.size - 1)
        else:
            assert sum(everyones) == wanted


def test_shards_are_even(ranks: Ranks) -> None:
    """To a cache line at each end of a shard of a bucket (two here, one for each group of the optimizer)."""
    for group in groups_of(ranks):
        run = build("dps", group, Recipe())
        mine = sum(tensor.numel() for entry in run.optimizer.param_groups for tensor in entry["params"])
        everyones = [int(row) for row in gather_bytes(group, str(mine).encode(), "shard numel")]
        assert sum(everyones) == sum(item.tensor.numel() for item in run.engine.parameters)
        assert max(everyones) - min(everyones) < 2 * 2 * 16
        run.engine.close()


@ours
@pytest.mark.parametrize("algorithm, bucket_bytes", [("window", 10**9), ("tree", 100)])
def test_state_that_was_there_before_is_cut(ranks: Ranks, strategy: str, algorithm: str, bucket_bytes: int) -> None:
    """The optimizer has trained alone for 2 steps when it is handed over."""
    recipe = Recipe(max_grad_norm=0.5)
    for group in groups_of(ranks):
        run = go_on(build("single", training.alone(), recipe), range(2))
        run.engine.close()
        run.engine = commlab.strategy(
            strategy, run.model, run.optimizer, group, max_grad_norm=0.5, algorithm=algorithm, bucket_bytes=bucket_bytes
        )
        assert_same(go_on(run, range(2, len(RAGGED))), reference(recipe))
        run.engine.close()


def saved(run: Run) -> bytes:
    """What a checkpoint of this rank holds."""
    file = io.BytesIO()
    torch.save((run.engine.state_dict(), run.scheduler.state_dict(), run.model.state_dict()), file)
    return file.getvalue()


def resumed(parts: list[Any], strategy: str, group: Group, recipe: Recipe, **options: Any) -> Run:
    """A new model, optimizer and scheduler that go on where ``parts`` stopped."""
    model = training.make_model(recipe)
    model.load_state_dict(parts[0][2])
    run = build(strategy, group, recipe, model, **options)
    run.engine.load_state_dict(*[part[0] for part in parts])
    run.scheduler.load_state_dict(parts[0][1])
    return run


@pytest.mark.parametrize("before", OURS)
def test_training_goes_on_under_another_strategy_and_number_of_ranks(ranks: Ranks, before: str) -> None:
    """Saved at 4 ranks; loaded at 3, at 2, at 1, as if it had never stopped."""
    recipe = Recipe(max_grad_norm=0.5)
    first, second, third = (window_group(ranks, *members) for members in GROUPS)
    run = None if first is None else go_on(build(before, first, recipe, bucket_bytes=300), range(STOP))
    checkpoints = gather_bytes(ranks.world, b"" if run is None else saved(run), "checkpoint")
    parts = [torch.load(io.BytesIO(part), weights_only=True) for part in checkpoints if part]
    assert len(parts) == 4
    for strategy, group, options in (
        ("dps", second, {"bucket_bytes": 100}),
        ("allreduce", third, {"algorithm": "ring"}),
        ("ps", second, {"algorithm": "direct"}),
        ("single", training.alone(), {}),
        ("dps", training.alone(), {}),
    ):
        if group is not None:
            again = resumed(copy.deepcopy(parts), strategy, group, recipe, **options)
            assert again.engine.steps == STOP
            go_on(again, range(STOP, len(RAGGED)))
            again.norms = reference(recipe).norms[:STOP] + again.norms
            assert_same(again, reference(recipe))
            assert_same_bits_everywhere(again)
            again.engine.close()
    if run is not None:
        # Saving changed nothing.
        assert_same(go_on(run, range(STOP, len(RAGGED))), reference(recipe))
        run.engine.close()


def test_a_missing_part_is_refused_on_the_ranks_that_need_it(ranks: Ranks) -> None:
    recipe = Recipe()
    for group in groups_of(ranks):
        run = go_on(build("dps", group, recipe), range(1))
        parts = [
            torch.load(io.BytesIO(part), weights_only=True)[0] for part in gather_bytes(group, saved(run), "checkpoint")
        ]
        fresh = build("dps", group, recipe)
        # The first rank's part: enough for the first rank alone.
        if group.rank == 0:
            fresh.engine.load_state_dict(parts[0])
        else:
            with pytest.raises(commlab.UsageError, match="has no saved state; load the parts of all ranks that saved"):
                fresh.engine.load_state_dict(parts[0])
        fresh.engine.close()
        run.engine.close()


def test_models_that_differ_are_found_when_the_engine_is_built(ranks: Ranks) -> None:
    """Even where they have equally many numbers."""
    group = ranks.subgroup([0, 1, 2])  # not one of those that other tests use: its ranks fall out of step
    if group is not None:
        model = torch.nn.Linear(*((3, 2) if group.rank else (2, 3)), bias=False)
        with pytest.raises(DisagreementError, match=r"rank 0: .*'weight \[3, 2\]'.*; ranks 1-2: .*'weight \[2, 3\]'"):
            commlab.strategy("dps", model, torch.optim.SGD(model.parameters(), lr=0.1), group)


def test_ranks_that_disagree_on_who_knows_the_total_are_named(ranks: Ranks) -> None:
    group = ranks.subgroup([1, 2, 3])
    if group is not None:
        run = build("allreduce", group, Recipe())
        loss = run.model(torch.ones(2, training.WIDTH)).sum()
        with pytest.raises(
            DisagreementError, match=r"rank 0: allreduce .*'bucket 0'.*ranks 1-2: allreduce .*'token count'"
        ):
            run.engine.backward(loss, 2, 6 if group.rank == 0 else None)
            run.engine.step()
