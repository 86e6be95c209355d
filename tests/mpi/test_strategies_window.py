"""Strategies in shared memory: one copy of the parameters for all ranks of a node, and all of it given back."""

from __future__ import annotations

import pytest
import torch
import training
from conftest import Ranks
from test_strategies import OURS, assert_same_bits_everywhere, groups_of, ours
from training import RAGGED, Recipe, assert_same, build, digest, go_on, reference, train

from commlab.collectives.group import Group
from commlab.collectives.hierarchical import open_nodes
from commlab.topology import Topology

algorithms = pytest.mark.parametrize("algorithm", ["window", "ring"])


@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_parameters_exist_once(ranks: Ranks, strategy: str) -> None:
    for group in groups_of(ranks):
        run = build(strategy, group, Recipe())
        if group.rank == group.size - 1:
            with torch.no_grad():
                run.model.gain.fill_(12.5)
        group.barrier()
        assert run.model.gain.item() == 12.5, "what one rank writes, all read"
        run.engine.close()
        with torch.no_grad():
            run.model.gain.fill_(group.rank)
        group.barrier()
        assert run.model.gain.item() == group.rank, "after close() every rank has its own"


@ours
@algorithms
def test_update_parameters_takes_effect_once(ranks: Ranks, strategy: str, algorithm: str) -> None:
    for group in groups_of(ranks):
        run = build(strategy, group, Recipe(), algorithm=algorithm)
        before = training.tensors(training.make_model(Recipe()))
        run.engine.update_parameters(lambda model: [parameter.mul_(3) for parameter in model.parameters()])
        group.barrier()
        for name, tensor in training.tensors(run.model).items():
            assert torch.equal(tensor, before[name] * 3), name  # the frozen one, too
        group.barrier()
        run.engine.close()


@ours
def test_close_keeps_the_model_and_gives_memory_back(ranks: Ranks, strategy: str) -> None:
    recipe = Recipe(samples=RAGGED[:2])
    for group in groups_of(ranks):
        window = group.window
        assert window is not None
        train(strategy, group, recipe)
        # Zeroed when it is taken again, so what was freed too early, or twice, would not train alike.
        before = len(window._segments), window._arena_used
        for _ in range(3):
            run = go_on(build(strategy, group, recipe), range(2))
            trained = digest(run.model)
            run.engine.close()
            assert digest(run.model) == trained
            assert_same(run, reference(recipe))
        assert (len(window._segments), window._arena_used) == before
        # The model is free: nothing happens behind its backward any more.
        run.model(torch.ones(1, training.WIDTH)).sum().backward()
        assert run.model.gain.grad is not None


@pytest.mark.parametrize("strategy", OURS)
def test_two_engines_at_once_do_not_disturb_each_other(ranks: Ranks, strategy: str) -> None:
    recipe = Recipe(max_grad_norm=0.5)
    for group in groups_of(ranks):
        first, second = build(strategy, group, recipe), build(strategy, group, recipe)
        for step in range(len(RAGGED)):
            training.backward(first.engine, recipe, step)
            training.backward(second.engine, recipe, step)
            for run in (second, first):
                run.engine.step()
                run.norms.append(run.engine.grad_norm)
                run.engine.zero_grad()
                run.scheduler.step()
        for run in (first, second):
            assert_same(run, reference(recipe))
            run.engine.close()


def test_hierarchical_over_two_nodes(ranks: Ranks) -> None:
    """Declared, as nodes may be: two of two ranks."""
    recipe = Recipe(max_grad_norm=0.5)
    plain = ranks.world.subgroup((0, 1, 2, 3))
    if plain is not None:
        group = Group(plain.transport, Topology(((0, 1), (2, 3))), plain.timeout_s)
        open_nodes(group)
        first, again = (train("allreduce", group, recipe, algorithm="hierarchical", bucket_bytes=400) for _ in range(2))
        assert first.digests == again.digests
        assert_same_bits_everywhere(first)
        assert_same(first, reference(recipe))
        group.close()
