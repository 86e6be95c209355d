"""Every strategy on 2, 3 and 4 ranks against ``single`` at the same global batch, and the same bits on all ranks after
every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import training
from mpi_ranks import Ranks
from mpi_strategies import EVERY_ALGORITHM, assert_same_bits_everywhere, groups_of, ours
from mpi_windows import close_all, window_group
from training import EVEN, RAGGED, Recipe, assert_same, build, go_on, reference, train

from commlab.runtime.control import exchange_records, gather_bytes
from commlab.runtime.group import Group
from commlab.runtime.nodes import open_window


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_all()


RECIPES = {
    "plain": Recipe(),
    "clipped, accumulated": Recipe(max_grad_norm=0.5, accumulation=2),
    "clipped above": Recipe(max_grad_norm=1e3),
    "counts summed": Recipe(total_known=False, accumulation=3),
    "no counts": Recipe(samples=EVEN, counted=False, accumulation=2, max_grad_norm=0.5),
}


WAYS: dict[str, dict[str, Any]] = {
    "window, tiny buckets": {"algorithm": "window", "bucket_bytes": 1},
    "messages": {"algorithm": "direct", "bucket_bytes": 400},
}


@ours
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("way", WAYS)
def test_training_equals_single(ranks: Ranks, strategy: str, recipe: str, way: str) -> None:
    """Param groups, a scheduler, tied, turned, tiny, empty, unused and sometimes used parameters, a ragged end: see
    training.py."""
    for group in groups_of(ranks):
        run = train(strategy, group, RECIPES[recipe], **WAYS[way])
        assert_same_bits_everywhere(run)
        assert_same(run, reference(RECIPES[recipe]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_ddp_equals_single(ranks: Ranks, recipe: str) -> None:
    """torch's own wants every parameter used."""
    used = replace(RECIPES[recipe], all_used=True)
    for group in groups_of(ranks):
        run = train("ddp", group, used)
        assert_same_bits_everywhere(run)
        assert_same(run, reference(used))


def test_ddp_exchanges_whatever_is_called(ranks: Ranks) -> None:
    """A12: the model itself, which is the engine's, or a loss that no forward of the model has made."""
    for group in groups_of(ranks):
        run = build("ddp", group, Recipe(all_used=True))
        assert run.engine.model is run.model
        inputs = torch.ones(2, training.WIDTH) * (1 + group.rank)
        run.engine.backward(run.model(inputs).sum(), 2, 2 * group.size)
        run.engine.step()
        run.engine.zero_grad()
        run.digests.append(training.digest(run.model))
        weights = sum(item.tensor.sum() * (1 + group.rank) for item in run.engine.parameters)
        run.engine.backward(weights, 2, 2 * group.size)
        run.engine.step()
        run.digests.append(training.digest(run.model))
        assert_same_bits_everywhere(run)


@ours
@pytest.mark.parametrize("way", WAYS)
def test_overlap_changes_when_buckets_travel_and_no_bit(ranks: Ranks, strategy: str, way: str) -> None:
    recipe = Recipe(max_grad_norm=0.5, accumulation=2)
    for group in groups_of(ranks):
        on, off = (train(strategy, group, recipe, overlap=overlap, **WAYS[way]) for overlap in (True, False))
        assert on.digests == off.digests and on.norms == off.norms
        assert_same(off, reference(recipe))


@ours
@pytest.mark.parametrize("algorithm", EVERY_ALGORITHM)
def test_every_algorithm_equals_single_and_itself(ranks: Ranks, strategy: str, algorithm: str) -> None:
    """Bit for bit from run to run, too."""
    recipe = Recipe(max_grad_norm=0.5)
    for group in groups_of(ranks):
        first, again = (train(strategy, group, recipe, algorithm=algorithm, bucket_bytes=10**9) for _ in range(2))
        assert first.digests == again.digests and first.norms == again.norms
        assert_same_bits_everywhere(first)
        assert_same(first, reference(recipe))


@ours
def test_64_bit_models_are_exact_to_64_bits(ranks: Ranks, strategy: str) -> None:
    recipe = Recipe(dtype=torch.float64, max_grad_norm=0.5, accumulation=2)
    for group in groups_of(ranks):
        run = train(strategy, group, recipe)
        assert_same_bits_everywhere(run)
        # The digits of 3e-6 in fp32, in fp64.
        assert_same(run, reference(recipe), 3e-6 * 2**-29)


@ours
@pytest.mark.parametrize("algorithm", ["window", "direct", "ring"])
def test_bf16_models_stay_within_their_rounding(ranks: Ranks, strategy: str, algorithm: str) -> None:
    recipe = Recipe(dtype=torch.bfloat16, max_grad_norm=0.5)
    for group in groups_of(ranks):
        run = train(strategy, group, recipe, algorithm=algorithm)
        assert_same_bits_everywhere(run)
        # A parameter is rounded after each of the 5 steps, to 2^-8 of it, here and in single.
        assert_same(run, reference(recipe), 2 * 5 * 2**-8)


def test_which_ranks_use_a_parameter(ranks: Ranks) -> None:
    """What the recipe is there for does happen: ``some`` is used on one rank only, on two, on none."""
    for group in groups_of(ranks):
        run = build("allreduce", group, Recipe())
        index = next(item.index for item in run.engine.parameters if item.name == "some.weight")
        uses = []
        for step in range(len(RAGGED)):
            training.backward(run.engine, run.recipe, step)
            used = b"y" if index in run.engine.buckets.used else b"n"
            uses.append([row == b"y" for row in exchange_records(group, used, "uses")])
            run.engine.step()
            run.engine.zero_grad()
        assert [sum(row) for row in uses] == [1, 1 if group.size == 2 else 2, 0, 0, 1]
        assert not any(all(row) for row in uses)
        run.engine.close()


@ours
def test_every_rank_starts_from_rank_0(ranks: Ranks, strategy: str) -> None:
    recipe = Recipe(samples=RAGGED[:2])
    for group in groups_of(ranks):
        model = training.make_model(recipe)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(group.rank)
        run = train(strategy, group, recipe, model)
        assert_same_bits_everywhere(run)
        assert_same(run, reference(recipe))


@ours
@pytest.mark.parametrize("wire", [None, "bf16"])
@pytest.mark.parametrize("algorithm", ["ring", "direct", "window"])
def test_bytes_sent_per_step(ranks: Ranks, strategy: str, wire: str | None, algorithm: str) -> None:
    """Over all ranks: n (P-1) numbers as gradients up, n (P-1) down, as gradients or as parameters; accumulation costs
    nothing. In the window nobody sends."""
    recipe = Recipe(accumulation=2, max_grad_norm=0.5)
    for group in groups_of(ranks):
        run = build(strategy, group, recipe, algorithm=algorithm, wire=wire)
        numel = sum(item.tensor.numel() for item in run.engine.parameters)
        before = group.bytes_sent
        go_on(run, [0])
        sent = [int(row) for row in gather_bytes(group, str(group.bytes_sent - before).encode(), "bytes sent")]
        up, down = (4 if wire is None else 2), (4 if wire is None or strategy != "allreduce" else 2)
        assert sum(sent) == (0 if algorithm == "window" else numel * (group.size - 1) * (up + down))
        run.engine.close()


@ours
@pytest.mark.parametrize("algorithm", ["window", "direct"])
def test_a_progress_thread_changes_no_bit(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, strategy: str, algorithm: str
) -> None:
    """Where a core is free, a thread moves operations on while the hooks start more of them."""
    recipe = Recipe(max_grad_norm=0.5, accumulation=2, total_known=False)
    inline, plain = window_group(ranks, 0, 1, 2), ranks.subgroup((0, 1, 2))
    if inline is not None and plain is not None:
        monkeypatch.setattr("commlab.runtime.group.usable_cores", lambda: 64)
        threaded = Group(plain.transport, plain.topology, plain.timeout_s, cores=64)
        open_window(threaded)
        assert threaded.progress.threaded
        wanted = train(strategy, inline, recipe, algorithm=algorithm, bucket_bytes=100)
        for _ in range(3):
            assert train(strategy, threaded, recipe, algorithm=algorithm, bucket_bytes=100).digests == wanted.digests
        threaded.close()
