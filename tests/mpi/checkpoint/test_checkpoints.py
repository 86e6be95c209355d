"""Checkpoints of several ranks: the same bits on as many ranks, ``single``'s numbers on others, one verdict for all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi_ranks import Ranks
from mpi_stores import closing_stores
from mpi_strategies import assert_same_bits_everywhere, ours
from mpi_windows import close_all, window_group
from training import RAGGED, Recipe, Run, assert_same, build, go_on, reference

from commlab.checkpoint import Checkpoints, files
from commlab.errors import AgreedError
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group

ALL, HALF = tuple(range(8)), (2, 3, 4, 5)


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def folder(ranks: Ranks) -> Iterator[Path]:
    """One for all ranks."""
    made = tempfile.mkdtemp() if ranks.rank == 0 else ""
    path = Path(gather_bytes(ranks.world, made.encode(), "folder")[0].decode())
    yield path
    if ranks.rank == 0:
        shutil.rmtree(path, ignore_errors=True)


def world(ranks: Ranks) -> Group:
    group = window_group(ranks, *ALL)
    assert group is not None
    return group


def checkpoints_of(run: Run, folder: Path) -> Checkpoints:
    return Checkpoints(folder, run.model, run.engine, run.scheduler)


def resumed(strategy: str, group: Group, recipe: Recipe, folder: Path, **options: Any) -> tuple[Run, Checkpoints, int]:
    run = build(strategy, group, recipe, **options)
    checkpoints = checkpoints_of(run, folder)
    found = checkpoints.restore()
    assert found is not None and found[1] == {"cursor": found[0]}
    return run, checkpoints, found[0]


@ours
@pytest.mark.parametrize("options", [{}, {"algorithm": "ring", "bucket_bytes": 300}], ids=["window", "messages"])
def test_as_many_ranks_go_on_with_the_same_bits(
    ranks: Ranks, folder: Path, strategy: str, options: dict[str, Any]
) -> None:
    recipe = Recipe(max_grad_norm=0.5, optimizer="AdamW")
    run = go_on(build(strategy, world(ranks), recipe, **options), range(2))
    torch.manual_seed(ranks.rank)
    checkpoints_of(run, folder).save(2, {"cursor": 2})
    drawn = torch.rand(2)
    assert len(list(folder.glob("step-*/rank-*"))) == 8
    go_on(run, range(2, len(RAGGED)))
    again, _, step = resumed(strategy, world(ranks), recipe, folder, **options)
    assert torch.equal(torch.rand(2), drawn), "every rank has its own random state back"
    go_on(again, range(step, len(RAGGED)))
    assert again.digests == run.digests[2:]
    assert again.norms == run.norms[2:]
    run.engine.close()
    again.engine.close()


@pytest.mark.parametrize("strategies", [("dps", "dps", "dps"), ("allreduce", "ps", "dps"), ("dps", "allreduce", "ps")])
def test_eight_ranks_then_four_then_eight(ranks: Ranks, folder: Path, strategies: tuple[str, str, str]) -> None:
    """As if one rank had never stopped."""
    recipe = Recipe(max_grad_norm=0.5)
    first, second, third = strategies
    run = go_on(build(first, world(ranks), recipe), range(2))
    checkpoints_of(run, folder).save(2, {"cursor": 2})
    run.engine.close()
    half = window_group(ranks, *HALF)
    if half is not None:
        run, checkpoints, step = resumed(second, half, recipe, folder)
        go_on(run, range(step, 4))
        checkpoints.save(4, {"cursor": 4})
        run.engine.close()
    ranks.world.barrier()
    run, _, step = resumed(third, world(ranks), recipe, folder)
    assert step == 4
    go_on(run, range(step, len(RAGGED)))
    run.norms = reference(recipe).norms[:4] + run.norms
    assert_same(run, reference(recipe))
    assert_same_bits_everywhere(run)
    run.engine.close()


@closing_stores
def test_with_servers_the_same_bits_follow(ranks: Ranks, folder: Path) -> None:
    """Workers share the work of saving what servers remember."""
    recipe = Recipe(max_grad_norm=0.5, optimizer="AdamW")
    group = ranks.group(*range(6))
    if group is None:
        return
    run = build("dps", group, recipe, servers=2)
    if run.engine.role == "worker":
        go_on(run, range(2))
        checkpoints_of(run, folder).save(2, {"cursor": 2})
        assert len(list(folder.glob("step-*/rank-*"))) == 4
        go_on(run, range(2, len(RAGGED)))
        run.engine.close()
    again = build("dps", group, recipe, servers=2)
    if again.engine.role == "worker":
        assert checkpoints_of(again, folder).restore() == (2, {"cursor": 2})
        go_on(again, range(2, len(RAGGED)))
        assert again.digests == run.digests[2:] and again.norms == run.norms[2:]
        again.engine.close()


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@closing_stores
def test_servers_take_over_from_owners_and_owners_from_servers(ranks: Ranks, folder: Path, optimizer: str) -> None:
    """Eight co-located, then three servers and four workers, then eight that all have everything."""
    recipe = Recipe(max_grad_norm=0.5, optimizer=optimizer)
    run = go_on(build("dps", world(ranks), recipe), range(2))
    checkpoints_of(run, folder).save(2, {"cursor": 2})
    run.engine.close()
    some = ranks.group(*range(7))
    if some is not None:
        run = build("dps", some, recipe, servers=3)
        if run.engine.role == "worker":
            checkpoints = checkpoints_of(run, folder)
            assert checkpoints.restore() == (2, {"cursor": 2})
            go_on(run, range(2, 4))
            checkpoints.save(4, {"cursor": 4})
            run.engine.close()
    ranks.world.barrier()
    run, _, step = resumed("allreduce", world(ranks), recipe, folder)
    assert step == 4
    go_on(run, range(step, len(RAGGED)))
    run.norms = reference(recipe).norms[:4] + run.norms
    # AdamW turns rounding noise of gradients near zero into whole steps.
    assert_same(run, reference(recipe), 1e-4 if optimizer == "AdamW" else 3e-6)
    assert_same_bits_everywhere(run)
    run.engine.close()


def test_one_altered_part_is_refused_by_all(ranks: Ranks, folder: Path) -> None:
    recipe = Recipe()
    run = build("dps", world(ranks), recipe)
    checkpoints = checkpoints_of(run, folder)
    for step in (1, 2):
        go_on(run, range(step - 1, step))
        checkpoints.save(step, {"cursor": step})
    if ranks.rank == 0:
        part = files.newest_first(folder)[0] / "rank-5-of-8.safetensors"
        content = bytearray(part.read_bytes())
        content[-1] ^= 1
        part.write_bytes(content)
    ranks.world.barrier()
    again, others, step = resumed("dps", world(ranks), recipe, folder)
    assert step == 1
    assert [reason.split(":")[0] for reason in others.refused] == ["step-0000000002"]
    assert "rank-5-of-8.safetensors was altered" in others.refused[0]
    go_on(again, range(1, 2))
    assert again.digests == run.digests[1:]
    run.engine.close()
    again.engine.close()


def test_a_rank_that_cannot_write_is_named_on_all(ranks: Ranks, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build("dps", world(ranks), Recipe())
    checkpoints = checkpoints_of(run, folder)
    checkpoints.save(1, {"cursor": 1})

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(AgreedError, match=r"No space left .*\(on ranks 3 of 8\)"):
        if ranks.rank == 3:
            patch.setattr(files, "_to_disk", full)
        checkpoints.save(2, {"cursor": 2})
    assert resumed("dps", world(ranks), Recipe(), folder)[2] == 1
    run.engine.close()
