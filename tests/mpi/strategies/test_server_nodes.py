"""ps where the node is the unit: one gradient a node and step, one copy of the parameters on each, and all of the state
on rank 0. What dps does alike: test_shards.py."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from lessons import taught
from mpi_nodes import close_nodes, everyones, four, nodes_of, require_writes_stay_on_the_node
from mpi_ranks import Ranks
from mpi_strategies import assert_same_bits_everywhere
from training import RAGGED, Recipe, Run, assert_same, build, go_on, reference, train

from commlab.checkpoint import Checkpoints
from commlab.errors import CommlabError, DisagreementError, NotFiniteError
from commlab.runtime.group import Group


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_nodes()


def node_sums(group: Group, *counts: int) -> list[tuple[int, ...]]:
    """The sums of ``counts`` over the ranks of each node. Collective."""
    rows = [[int(count) for count in row.split()] for row in everyones(group, " ".join(map(str, counts)))]
    return [tuple(sum(rows[rank][at] for rank in node) for at in range(len(counts))) for node in group.nodes]


def sent_in_a_step(run: Run, step: int) -> list[tuple[int, ...]]:
    """The bytes and messages that each node has sent in a step. Collective."""
    group = run.engine.group
    before = group.bytes_sent, group.messages_sent
    go_on(run, [step])
    return node_sums(group, group.bytes_sent - before[0], group.messages_sent - before[1])


@pytest.mark.parametrize("wire", [None, "fp16"])
def test_a_node_sends_one_gradient(ranks: Ranks, wire: str | None) -> None:
    """Counted over the ranks of each node: the gradient once, in as many messages as there are shards with numbers in
    them; the server's node sends the parameters once. With every rank for itself a node sends as many gradients as it
    has ranks."""
    group = four(ranks)
    recipe = Recipe(samples=training.EVEN, max_grad_norm=0.5)
    run = go_on(build("ps", group, recipe, bucket_bytes=10**9, wire=wire), range(2))
    numel = sum(bucket.numel for bucket in run.engine.buckets.buckets)
    shards = sum(min(2, -(-bucket.numel // 16)) for bucket in run.engine.buckets.buckets)
    assert run.engine.levels is not None and run.engine.levels.node.size == run.engine.levels.across.size == 2
    assert sent_in_a_step(run, 2) == [(4 * numel, shards), ((4 if wire is None else 2) * numel, shards)]
    run.engine.close()
    run = go_on(build("ps", group, recipe, bucket_bytes=10**9, wire=wire, shard="job", algorithm="ring"), range(2))
    assert run.engine.levels is None and run.engine.sharding == "job, as asked for"
    assert sent_in_a_step(run, 2)[1][0] >= 2 * (4 if wire is None else 2) * numel
    run.engine.close()


def test_one_copy_on_a_node_and_the_state_on_rank_0(ranks: Ranks) -> None:
    group = four(ranks)
    run = go_on(build("ps", group, Recipe(optimizer="AdamW")), range(len(RAGGED)))
    assert_same(run, reference(run.recipe))
    mine = sum(tensor.numel() for entry in run.optimizer.param_groups for tensor in entry["params"])
    total = sum(item.tensor.numel() for item in run.engine.parameters)
    assert [int(text) for text in everyones(group, str(mine))] == [total, 0, 0, 0]
    assert bool(run.optimizer.state) == (group.rank == 0)
    assert run.engine.saves_state and run.engine.across is None
    require_writes_stay_on_the_node(group, run.engine, writer=3)
    run.engine.close(state=False)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 3e-6 * 2**-29), (torch.bfloat16, 2 * 5 * 2**-8)], ids=str)
def test_other_dtypes(ranks: Ranks, dtype: torch.dtype, tolerance: float) -> None:
    """Exact to 64 bits, and within the rounding of a bf16 model's own parameters."""
    group = four(ranks)
    recipe = Recipe(dtype=dtype, max_grad_norm=0.5)
    run = train("ps", group, recipe, bucket_bytes=500)
    assert_same_bits_everywhere(run)
    assert_same(run, reference(recipe), tolerance)


def test_nodes_of_one_rank_go_on_as_before(ranks: Ranks) -> None:
    """No window to add up in: every rank sends for itself, and the engine says why."""
    group = nodes_of(ranks, "3 nodes of 1")
    if group is not None:
        run = train("ps", group, Recipe(max_grad_norm=0.5))
        assert run.engine.sharding.startswith("job (nodes have [1, 1, 1] ranks"), run.engine.sharding
        assert run.engine.levels is None
        assert_same(run, reference(run.recipe))
        assert_same_bits_everywhere(run)


def test_an_algorithm_names_what_joins_the_nodes(ranks: Ranks) -> None:
    """With shard='node'; alone it names what joins all ranks."""
    group = four(ranks)
    for options, said in (
        ({"algorithm": "tree", "shard": "node"}, r"node \(as asked for\).*rank 0 all of the optimizer's state"),
        ({"algorithm": "tree"}, r"job \(algorithm tree was named"),
    ):
        run = train("ps", group, Recipe(max_grad_norm=0.5), **options)
        assert re.match(said, run.engine.sharding), run.engine.sharding
        assert_same(run, reference(run.recipe))
        assert_same_bits_everywhere(run)


@pytest.mark.parametrize("wire", [None, "fp16"])
def test_the_reduced_gradient_is_edited(ranks: Ranks, wire: str | None) -> None:
    """A1: by rank 0 alone, which has all of it once; norms are the same on all ranks, and see the edits."""
    group = four(ranks)

    def edited(run: Run) -> list[dict[str, float]]:
        found = []
        for step in range(3):
            training.backward(run.engine, run.recipe, step)
            before = run.engine.gradient_norms()
            pieces = run.engine.reduced_gradients()
            assert all(not piece.replicated and piece.whole for piece in pieces)
            training.clip_and_add_noise(pieces, before)
            found += [before, run.engine.gradient_norms()]
            run.engine.step()
            run.engine.zero_grad()
            run.digests.append(training.digest(run.model))
            run.norms.append(run.engine.grad_norm)
        return found

    recipe = Recipe(samples=training.EVEN, max_grad_norm=0.02)
    run = build("ps", group, recipe, bucket_bytes=300, wire=wire)
    norms = edited(run)
    assert len(set(everyones(group, repr(norms)))) == 1
    pieces = (training.backward(run.engine, recipe, 3), run.engine.reduced_gradients())[1]
    assert bool(pieces) == (group.rank == 0)
    run.engine.step()
    assert_same_bits_everywhere(run)
    run.engine.close()
    alone = build("single", training.alone(), recipe)
    wanted, rel = edited(alone), 1e-5 if wire is None else 4e-3
    assert run.norms == pytest.approx(alone.norms, rel=rel)
    for mine, theirs in zip(norms, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=rel)


@pytest.mark.parametrize("wire", [None, "fp16"])
def test_an_inf_on_one_rank_of_another_node_skips_the_step(ranks: Ranks, wire: str | None) -> None:
    """Precision fp16: bit for bit what comes out when the step is left out; the loss scale halves on all ranks."""
    group = four(ranks)
    options: dict[str, Any] = {
        "precision": "fp16", "autocast": "off", "max_grad_norm": 1.0, "optimizer": "AdamW", "wire": wire, "scale": 16.0,
    }  # fmt: skip

    def tamper(loss: torch.Tensor, step: int) -> torch.Tensor:
        return loss * torch.inf if step == 3 and group.rank == 3 else loss

    hurt, _, digests, updates = taught("ps", group, tamper=tamper, **options)
    left_out, _, wanted, _ = taught("ps", group, skip=3, **options)
    assert hurt.levels is not None and updates == [step != 3 for step in range(len(updates))]
    assert digests == wanted and hurt.precision.scale == left_out.precision.scale
    assert len(set(everyones(group, b"".join(digests).hex()))) == 1


def test_an_overflow_names_its_rank(ranks: Ranks) -> None:
    """A14: nonfinite="error", on every rank; the next step may begin."""
    group = four(ranks)
    run = go_on(build("ps", group, Recipe(samples=training.EVEN), nonfinite="error"), [0])
    poison = lambda gradient: gradient * torch.nan  # noqa: E731
    hook = run.model.middle.weight.register_hook(poison) if group.rank == 2 else None
    with pytest.raises(NotFiniteError, match=r"rank 2: the gradient of 'middle.weight'"):
        go_on(run, [1])
    if hook is not None:
        hook.remove()
    go_on(run, range(1, 5))
    assert_same(run, reference(run.recipe))
    run.engine.close()


def test_copies_of_nodes_are_compared(ranks: Ranks) -> None:
    """A4, B6: what one node alone has in its copy of the parameters is named, with its ranks."""
    group = four(ranks)
    run = go_on(build("ps", group, Recipe(samples=training.EVEN)), range(2))
    run.engine.settle()
    # Before the engine looks again at what was written: as if a message had gone wrong.
    if group.rank == 2:
        run.engine.parameters[-1].tensor.data.add_(1)
        run.engine.strategy.edits.note()
    group.barrier()
    if group.rank == 3:
        run.engine.strategy.edits.note()
    with pytest.raises(
        DisagreementError, match=r"different copies of 'last.bias' \[0:6\] \(rank [01]: copy 1, rank [23]"
    ):
        run.engine.settle()
    with pytest.raises(CommlabError):
        run.engine.settle()
    run.engine.close()


def test_checkpoints(ranks: Ranks) -> None:
    """Saved by rank 0, which has all; taken up by dps on the same nodes, and by ps again."""
    group = four(ranks)
    recipe = Recipe(max_grad_norm=0.5, optimizer="AdamW")
    folder = Path(everyones(group, tempfile.mkdtemp() if not group.rank else "")[0])
    run = go_on(build("ps", group, recipe, bucket_bytes=300), range(2))
    Checkpoints(folder, run.model, run.engine, run.scheduler).save(2, {})
    run.engine.load_state_dict(run.engine.state_dict())
    run = go_on(run, range(2, len(RAGGED)))
    assert_same(run, reference(recipe))
    run.engine.close()
    for strategy in ("dps", "ps"):
        again = build(strategy, group, recipe)
        found = Checkpoints(folder, again.model, again.engine, again.scheduler).restore()
        assert found is not None and found[0] == 2
        go_on(again, range(2, len(RAGGED)))
        again.norms = reference(recipe).norms[:2] + again.norms
        assert_same(again, reference(recipe))
        again.engine.close()


def test_a_dropped_step_and_what_follows(ranks: Ranks) -> None:
    """Ranks in different steps: told on all ranks, and nothing was updated; the next steps are right."""
    group = four(ranks)
    recipe = replace(Recipe(), samples=training.EVEN)
    run = go_on(build("ps", group, recipe, bucket_bytes=200), [0])
    before = training.digest(run.model)
    training.backward(run.engine, recipe, 1)
    with pytest.raises(DisagreementError, match="step"):
        run.engine.step(7 if group.rank == 3 else 1)
    assert training.digest(run.model) == before
    run.engine.zero_grad()
    go_on(run, range(1, 5))
    assert_same(run, reference(recipe))
    assert_same_bits_everywhere(run)
    run.engine.close()
