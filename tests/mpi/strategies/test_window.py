"""What is particular to strategies in the window: what they compute, and who may write the ONE copy of the parameters,
and when. Where it lies is in test_window_memory.py."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
import torch
import training
from mpi_nodes import everyones
from mpi_ranks import Ranks
from mpi_strategies import assert_same_bits_everywhere, groups_of, ours
from mpi_windows import close_all
from training import RAGGED, Recipe, Run, assert_same, build, go_on, reference, train

import commlab
from commlab.errors import UsageError

SERVERS = ("ps", "dps")

servers = pytest.mark.parametrize("strategy", SERVERS)


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_all()


@ours
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(max_grad_norm=0.5, accumulation=2),
        Recipe(optimizer="AdamW", total_known=False),
        Recipe(samples=training.EVEN, counted=False, max_grad_norm=0.5),
    ],
    ids=["plain", "clipped, accumulated", "AdamW, counts summed", "means"],
)
def test_the_window_is_what_auto_takes_and_equals_single(ranks: Ranks, strategy: str, recipe: Recipe) -> None:
    """Unused and sometimes used parameters, a ragged end and the like: see training.py."""
    for group in groups_of(ranks):
        sent = group.bytes_sent
        run = go_on(build(strategy, group, recipe), range(len(recipe.samples)))
        assert run.engine.in_window
        assert group.bytes_sent == sent, "somebody sent something"
        assert_same_bits_everywhere(run)
        assert_same(run, reference(recipe))
        run.engine.close()


@ours
def test_the_window_equals_messages(ranks: Ranks, strategy: str) -> None:
    recipe = Recipe(max_grad_norm=0.5)
    for group in groups_of(ranks):
        by_messages = train(strategy, group, recipe, algorithm="direct")
        assert not by_messages.engine.in_window
        assert_same(train(strategy, group, recipe, algorithm="window"), by_messages)


@ours
def test_parameters_are_updated_once(ranks: Ranks, strategy: str) -> None:
    """``update_parameters`` works on every copy once; without it ranks that share one would all write."""
    for group in groups_of(ranks):
        run = build(strategy, group, Recipe())
        before = {name: tensor.clone() for name, tensor in training.tensors(run.model).items()}
        calls = []

        def change(model: torch.nn.Module) -> None:
            calls.append(1)  # noqa: B023
            for parameter in model.parameters():
                parameter.mul_(2.0).add_(1.0)

        # All have read what was there before anybody writes.
        group.barrier()
        run.engine.update_parameters(change)
        for name, tensor in training.tensors(run.model).items():
            if name != "fixed" or not strategy.endswith("ps"):
                assert torch.equal(tensor, before[name] * 2 + 1), name
        assert sum(map(int, everyones(group, str(len(calls))))) == (1 if strategy in SERVERS else group.size)
        group.barrier()
        run.engine.close()


@servers
@pytest.mark.parametrize("way", ["mul_", "data.mul_", "max_norm"])
def test_writes_to_the_one_copy_are_refused(ranks: Ranks, strategy: str, way: str) -> None:
    """A9: mul_ on every rank would act P times; also through .data, which torch does not count, and in forward."""
    for group in groups_of(ranks):
        model = torch.nn.Embedding(40, 5, max_norm=0.1 if way == "max_norm" else None)
        engine = commlab.strategy(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), group)
        ids = torch.arange(group.rank, group.rank + 3)
        if way != "max_norm":
            engine.backward(model(ids).sum())
            engine.step()
        with torch.no_grad():
            if way == "mul_":
                model.weight.mul_(0.5)
            elif way == "data.mul_":
                model.weight.data.mul_(0.5)
        engine.backward(model(ids).sum())
        with pytest.raises(UsageError, match=r"'weight'.* was written .*update_parameters.*nothing was updated"):
            engine.step()
        engine.close()


@servers
def test_graphs_across_a_step_raise_on_every_rank(ranks: Ranks, strategy: str) -> None:
    """A9: also where another rank has written the parameter, in the memory of all."""
    for group in groups_of(ranks):
        run = build(strategy, group, Recipe(samples=training.EVEN))
        late = run.model(torch.ones(2, training.WIDTH)).sum()
        training.backward(run.engine, run.recipe, 0)
        run.engine.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()
        run.engine.zero_grad()
        run.engine.close()


@ours
@pytest.mark.parametrize("wire", [None, "bf16"])
def test_reduced_gradients_in_the_window(ranks: Ranks, strategy: str, wire: str | None) -> None:
    """A1: pieces lie in the window, and their edits count: clipping, noise and norms per layer, as of one rank."""

    def edited(each: Run) -> Run:
        for step in range(3):
            training.backward(each.engine, each.recipe, step)
            norms = each.engine.gradient_norms()
            training.clip_and_add_noise(each.engine.reduced_gradients(), norms)
            each.engine.step()
            each.engine.zero_grad()
            each.digests.append(training.digest(each.model))
            each.norms.append(each.engine.grad_norm)
        return each

    recipe = Recipe(samples=training.EVEN, max_grad_norm=0.02)
    wanted = edited(build("single", training.alone(), recipe))
    for group in groups_of(ranks):
        run = edited(build(strategy, group, recipe, wire=wire))
        assert_same_bits_everywhere(run)
        assert_same(run, wanted, 1e-5 if wire is None else 2**-6)
        run.engine.close()


@ours
@pytest.mark.parametrize("wire", [None, "fp16", "bf16"])
def test_several_engines_at_once(ranks: Ranks, strategy: str, wire: str | None) -> None:
    recipe = Recipe()
    for group in groups_of(ranks):
        runs = [build(strategy, group, recipe, wire=wire, bucket_bytes=200 * (1 + at)) for at in range(3)]
        for step in range(len(RAGGED)):
            for run in runs:
                go_on(run, [step])
        for run in runs:
            assert_same_bits_everywhere(run)
            run.engine.close()
        if strategy == "allreduce":
            # The same sums of the same numbers, however they are cut into buckets. (Under servers parameters lie where
            # their bucket has them, and a product of matrices may round by where they lie.)
            assert runs[0].digests == runs[1].digests == runs[2].digests
        elif wire is None:
            assert_same(runs[1], runs[0])
            assert_same(runs[2], runs[0])


@servers
def test_nobody_is_updated_while_it_computes(ranks: Ranks, strategy: str) -> None:
    """One rank is late in its backward pass: the parameters that it computes with stay what they were."""
    for group in groups_of(ranks):
        run = build(strategy, group, Recipe(samples=(12,) * 3, all_used=True), bucket_bytes=100)
        slow = group.size - 1
        seen: list[bytes] = []

        def look(_: torch.Tensor) -> None:
            time.sleep(2e-3)
            seen.append(training.digest(run.model))  # noqa: B023

        if group.rank == slow:
            for item in run.engine.parameters:
                item.tensor.register_post_accumulate_grad_hook(look)
        for step in range(3):
            before = training.digest(run.model)
            training.backward(run.engine, run.recipe, step)
            assert set(seen) <= {before}, "the parameters changed during backward"
            assert len(seen) > 5 or group.rank != slow
            seen.clear()
            run.engine.step()
            assert training.digest(run.model) != before
            run.engine.zero_grad()
        assert re.fullmatch(r"[1-9]\d*", str(run.engine.steps))
        run.engine.close()
