"""Where the parameters of strategies in the window lie: ONE copy, what is said when a parameter is moved away from it,
and the memory that engines and groups leave behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import training
from mpi_nodes import everyones
from mpi_ranks import Ranks
from mpi_strategies import groups_of, ours
from mpi_windows import close_all
from training import RAGGED, Recipe, assert_same, build, go_on, reference, train

import commlab
from commlab.errors import AgreedError, UsageError
from commlab.runtime.nodes import open_window
from commlab.strategies.engine import Engine

SERVERS = ("ps", "dps")

pytestmark = pytest.mark.usefixtures("small_heap")
servers = pytest.mark.parametrize("strategy", SERVERS)


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_all()


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
    """On all ranks: nothing is updated then, the step is dropped, and with the parameter back in its place the step can
    be made anew."""
    recipe = Recipe(max_grad_norm=0.5)
    for group in groups_of(ranks):
        run = go_on(build(strategy, group, recipe), range(2))
        training.backward(run.engine, recipe, 2)
        weight = run.model.middle.weight
        place = weight.data
        weight.data = place.clone()
        before = training.digest(run.model)
        where = f" (so it is on ranks {', '.join(map(str, range(group.size)))})" if group.size > 1 else ""
        with pytest.raises(AgreedError, match=r"rank 0: parameter 'middle.weight' was given other memory") as told:
            run.engine.step()
        assert str(told.value).endswith(f"{where}; nothing was updated")
        assert training.digest(run.model) == before
        weight.data = place
        training.backward(run.engine, recipe, 2)
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
def test_a_closed_group_leaves_models_alone(ranks: Ranks, strategy: str) -> None:
    """The model's parameters lie in the window when the group is shut down, and live on there."""
    members = (0, 1, 2, 3) if ranks.rank < 4 else (4, 5, 6, 7)
    parts = [ranks.subgroup(part) for part in ((0, 1, 2, 3), (4, 5, 6, 7))]
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
