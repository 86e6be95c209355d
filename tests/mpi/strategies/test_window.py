"""What is particular to strategies in the window: ONE copy of the parameters, who may write it "
"and when, and what is left."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import training
from mpi_ranks import Ranks
from mpi_strategies import assert_same_bits_everywhere
from mpi_windows import close_all, window_group
from training import RAGGED, Recipe, Run, assert_same, build, go_on, reference, train

import commlab
from commlab.errors import UsageError
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group
from commlab.runtime.nodes import open_window
from commlab.strategies.engine import Engine

SERVERS = ("ps", "dps")
GROUPS = ((0, 1, 2, 3), (4, 5, 6), (6, 7))

pytestmark = pytest.mark.usefixtures("small_heap")
servers = pytest.mark.parametrize("strategy", SERVERS)
ours = pytest.mark.parametrize("strategy", ("allreduce", *SERVERS))


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_all()


def groups_of(ranks: Ranks) -> list[Group]:
    """This rank's groups of 4, 3 and 2 ranks that share a window."""
    made = [window_group(ranks, *members) for members in GROUPS]
    return [group for group in made if group is not None]


class Page(NamedTuple):
    """What lies behind an address: equal on two ranks exactly when they see the same memory."""

    file: str
    offset: int


def page_of(address: int) -> Page:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, device, inode = line.split()[:5]
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= address < stop:
            return Page(f"{device} {inode}", int(offset, 16) + address - start)
    raise AssertionError("no such memory")


def pages_of(engine: Engine) -> str:
    return repr([tuple(page_of(item.tensor.data_ptr())) for item in engine.parameters if item.tensor.numel()])


def everyones(group: Group, text: str) -> list[str]:
    return [row.decode() for row in gather_bytes(group, text.encode(), "notes")]


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


@servers
@pytest.mark.parametrize("wire", [None, "bf16"])
def test_there_is_one_copy_of_the_parameters(ranks: Ranks, strategy: str, wire: str | None) -> None:
    for group in groups_of(ranks):
        run = build(strategy, group, Recipe(), wire=wire)
        pages = everyones(group, pages_of(run.engine))
        assert len(set(pages)) == 1, "ranks have different memory behind their parameters"
        # What one rank writes, all others read.
        writer = group.size - 1
        if group.rank == writer:
            with torch.no_grad():
                run.model.turned[2, 3] = 123.0
        group.barrier()
        assert run.model.turned[2, 3] == 123.0
        group.barrier()
        run.engine.close()
        assert len(set(everyones(group, pages_of(run.engine)))) == group.size, "each rank has its own again"


def test_allreduce_keeps_a_copy_per_rank_and_gradients_in_the_window(ranks: Ranks) -> None:
    for group in groups_of(ranks):
        run = build("allreduce", group, Recipe(all_used=True))
        assert len(set(everyones(group, pages_of(run.engine)))) == group.size
        training.backward(run.engine, run.recipe, 0)
        run.engine.step()
        assert group.window is not None
        for item in run.engine.parameters:
            gradient = item.tensor.grad
            if gradient is not None and gradient.numel() and item.tensor.is_contiguous():
                assert group.window.locate(gradient) is not None, f"the gradient of {item.name} is a copy"
        run.engine.close()
        assert all(item.tensor.grad is None for item in run.engine.parameters)


@servers
def test_memory_of_all_ranks_together(ranks: Ranks, strategy: str) -> None:
    """The kernel's own count: pages that P processes share weigh 1/P in each, so one copy adds up to one."""
    for group in groups_of(ranks):
        model = torch.nn.Linear(512, 2048, bias=False)
        size_bytes = 4 * model.weight.numel()
        engine = commlab.strategy(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), group)
        group.barrier()
        file = page_of(model.weight.data_ptr()).file
        shared_bytes, mapped_bytes = memory_of(file)
        group.barrier()
        added = [tuple(map(int, row.split())) for row in everyones(group, f"{shared_bytes} {mapped_bytes}")]
        # An arena of 16 MiB holds the parameters and rank 0's gradients.
        assert sum(shared for shared, _ in added) <= max(mapped for _, mapped in added) + 4096 * group.size
        assert size_bytes <= sum(shared for shared, _ in added) <= 17 * 2**20
        engine.close()


def memory_of(file: str) -> tuple[int, int]:
    """Proportional and mapped bytes of one file in this process."""
    device, inode = file.split()
    proportional = mapped = 0
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            here = words[3:5] == [device, inode]
        elif here and words[0] == "Pss:":
            proportional += 1024 * int(words[1])
        elif here and words[0] == "Size:":
            mapped += 1024 * int(words[1])
    return proportional, mapped


@servers
def test_a_parameter_that_was_moved_is_named(ranks: Ranks, strategy: str) -> None:
    """Nothing is updated then, and with the parameter back in its place the step can be repeated."""
    recipe = Recipe(max_grad_norm=0.5)
    for group in groups_of(ranks):
        run = go_on(build(strategy, group, recipe), range(2))
        training.backward(run.engine, recipe, 2)
        weight = run.model.middle.weight
        place = weight.data
        weight.data = place.clone()
        before = training.digest(run.model)
        with pytest.raises(UsageError, match=rf"rank {group.rank}: parameter 'middle.weight' was given other memory"):
            run.engine.step()
        assert training.digest(run.model) == before
        weight.data = place
        run.engine.step()
        run.digests.append(training.digest(run.model))
        run.norms.append(run.engine.grad_norm)
        run.engine.zero_grad()
        run.scheduler.step()
        assert_same(go_on(run, range(3, len(RAGGED))), reference(recipe))
        run.engine.close()


@servers
def test_ways_to_move_a_parameter(ranks: Ranks, strategy: str) -> None:
    for group in groups_of(ranks):
        for move in (
            lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
            lambda model: model.double(),
            lambda model: setattr(model.last.bias, "data", model.last.bias.data.clone()),
            lambda model: setattr(model.last, "bias", torch.nn.Parameter(model.last.bias.data)),
        ):
            run = build(strategy, group, Recipe())
            training.backward(run.engine, run.recipe, 0)
            move(run.model)
            with pytest.raises(UsageError, match=r"was given other memory after commlab\.strategy"):
                run.engine.step()
            run.engine.close()


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


@servers
def test_close_gives_every_rank_parameters_of_its_own(ranks: Ranks, strategy: str) -> None:
    for group in groups_of(ranks):
        run = train(strategy, group, Recipe(samples=RAGGED[:2]))
        after = training.tensors(run.model)
        want = {name: tensor.clone() for name, tensor in after.items()}
        group.barrier()
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.fill_(float(group.rank))
        group.barrier()
        assert all((tensor == group.rank).all() for tensor in training.tensors(run.model).values())
        for name, tensor in want.items():
            after[name].copy_(tensor)
        assert_same(run, reference(Recipe(samples=RAGGED[:2])))


@ours
def test_engines_give_their_memory_back(ranks: Ranks, strategy: str) -> None:
    """The next engine of the same model gets the same places; a step that was begun is dropped."""
    for group in groups_of(ranks):
        window = group.window
        assert window is not None
        used = []
        for turn in range(4):
            run = build(strategy, group, Recipe(), bucket_bytes=300)
            if turn % 2:
                training.backward(run.engine, run.recipe, 0)
            else:
                go_on(run, range(2))
            run.engine.close()
            used.append((len(window.area.segments), window.area.arena_used))
        assert len(set(used[1:])) == 1, used


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


@ours
def test_a_closed_group_leaves_models_alone(ranks: Ranks, strategy: str) -> None:
    """The model's parameters lie in the window when the group is shut down, and live on there."""
    members = (0, 1, 2, 3) if ranks.rank < 4 else (4, 5, 6, 7)
    parts = [ranks.world.subgroup(part) for part in ((0, 1, 2, 3), (4, 5, 6, 7))]
    group = parts[members[0] // 4]
    assert group is not None
    open_window(group)
    run = go_on(build(strategy, group, Recipe()), range(2))
    digest = training.digest(run.model)
    group.barrier()
    group.close()
    gc.collect()
    assert training.digest(run.model) == digest
    with pytest.raises(UsageError, match="shut down"):
        training.backward(run.engine, run.recipe, 2)
        run.engine.step()
