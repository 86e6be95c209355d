"""dps and ps where the node is the unit: declared nodes of one launch, each with a window and one copy of the
parameters. What ps alone does: test_server_nodes.py."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
import training
from closed_form import UNIT_ROUNDOFF
from learners import CASES, assert_like, plain, trained
from mpi_nodes import close_nodes, everyones, four, nodes_of, require_writes_stay_on_the_node
from mpi_ranks import TIMEOUT_S, Ranks
from mpi_strategies import assert_same_bits_everywhere
from training import RAGGED, Recipe, Run, assert_same, build, go_on, reference, train

import commlab
from commlab.checkpoint import Checkpoints
from commlab.errors import CommlabError, DisagreementError
from commlab.job.topology import declared
from commlab.native.dtypes import WIRES
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group
from commlab.runtime.nodes import open_nodes

servers = pytest.mark.parametrize("strategy", ["dps", "ps"])


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_nodes()


@servers
@pytest.mark.parametrize(
    "layout, recipe, options",
    [
        ("2 nodes of 2", Recipe(max_grad_norm=0.5), {"bucket_bytes": 100}),
        ("2 nodes of 3", Recipe(max_grad_norm=0.5, accumulation=2, optimizer="AdamW", total_known=False), {}),
        ("3 nodes of 2, linked", Recipe(max_grad_norm=0.5, accumulation=2), {"bucket_bytes": 100}),
        (
            "3 nodes of 2, linked",
            Recipe(samples=training.EVEN, counted=False),
            {"bucket_bytes": 300, "algorithm": "ring", "shard": "node"},
        ),
    ],
    ids=["clipped", "AdamW, accumulated, counts summed", "linked", "means, ring between nodes"],
)
def test_as_single(ranks: Ranks, strategy: str, layout: str, recipe: Recipe, options: dict[str, object]) -> None:
    """Every step's parameters and norm, for ragged batches, ranks without samples, frozen and unused parameters."""
    group = nodes_of(ranks, layout)
    if group is not None:
        run = train(strategy, group, recipe, **options)
        assert run.engine.sharding.startswith("node ("), run.engine.sharding
        assert_same(run, reference(recipe))
        assert_same_bits_everywhere(run)


@servers
@pytest.mark.parametrize("wire, layout", [("fp16", "2 nodes of 3"), ("bf16", "3 nodes of 2, linked")])
def test_wires(ranks: Ranks, strategy: str, wire: str, layout: str) -> None:
    """The same bits on all ranks and from run to run; rounded when packed, between nodes, and in the result."""
    group = nodes_of(ranks, layout)
    if group is not None:
        recipe = Recipe(accumulation=2, max_grad_norm=0.5)
        run, again = (train(strategy, group, recipe, wire=wire, bucket_bytes=300) for _ in range(2))
        assert run.digests == again.digests
        assert_same_bits_everywhere(run)
        worst, name = training.difference(training.tensors(run.model), training.tensors(reference(recipe).model))
        assert 0 < worst <= 3 * 5 * UNIT_ROUNDOFF[WIRES[wire]], name


def test_one_copy_and_an_lth_of_the_state(ranks: Ranks) -> None:
    """Parameters lie in one place for the ranks of a node, and another for the next; state exists once on each; only
    gradients travel between nodes, each shard as in an allreduce."""
    group = four(ranks)
    recipe = Recipe(optimizer="AdamW", samples=training.EVEN, total_known=True)
    run = go_on(build("dps", group, recipe), range(2))
    before = group.bytes_sent
    across, holders = run.engine.across, run.engine._training.holders
    assert across is not None and holders.size == across.size == 2
    go_on(run, [2])
    shard_bytes = sum(each.numel for each in run.engine.buckets.buckets) * 4 / 2
    assert abs((group.bytes_sent - before) - shard_bytes) <= 64 * len(run.engine.buckets.buckets), "gradients alone"
    mine = sum(tensor.numel() for entry in run.optimizer.param_groups for tensor in entry["params"])
    sums = [int(text) for text in everyones(holders, str(mine))]
    assert sum(sums) == sum(item.tensor.numel() for item in run.engine.parameters)
    assert max(sums) - min(sums) < 2 * 2 * 16
    require_writes_stay_on_the_node(group, run.engine, writer=0)
    run.engine.close(state=False)


@servers
@pytest.mark.parametrize("case", ["unfrozen and added", "frozen, and trained again", "another module in its place"])
def test_what_is_trained_changes(ranks: Ranks, strategy: str, case: str) -> None:
    """A2, A13, B7: planned anew on every node; close() gives every rank the whole optimizer."""
    group = four(ranks)
    model, optimizer, engine = trained(group, strategy, case, bucket_bytes=700)
    assert len(set(gather_bytes(group, training.digest(model), "digest"))) == 1
    engine.close()
    assert_like((model, optimizer), plain(*CASES[case]))


@servers
def test_what_users_do(ranks: Ranks, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A1 to A19, B7: as the table of docs/porting.md has it, but that ranks of a node share parameters, which
    none of them may write; right, or refused on every rank."""
    group = four(ranks)
    monkeypatch.setattr(kinds, "RANKS", group.size)
    cells = [
        row.split("|")[-3 if strategy == "dps" else -4].strip() for row in kinds.table_on_the_page().splitlines()[2:]
    ]
    for kind, wanted in zip(kinds.KINDS, cells, strict=True):
        error, found = "", []
        try:
            found = kinds.coupled(kind, strategy, group.rank, group)
        except (CommlabError, RuntimeError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        outcomes = [bool(text) for text in everyones(group, error)]
        wanted = "refused" if kind.row == "A9" else wanted
        assert outcomes == [wanted == "refused"] * group.size, (kind.text, wanted, error)
        for tensor, right in zip(found, kinds.plain(kind) if found else (), strict=True):
            torch.testing.assert_close(tensor, right, rtol=1e-12, atol=1e-14, msg=kind.text)


def edited(run: Run, odd_rank: int | None = None) -> Run:
    """Noise, clipping and norms per layer, by the pieces of the reduced gradient; on ``odd_rank`` once more."""
    for step in range(3):
        training.backward(run.engine, run.recipe, step)
        norms = run.engine.gradient_norms()
        pieces = run.engine.reduced_gradients()
        training.clip_and_add_noise(pieces, norms)
        if step == 2 and run.engine.group.rank == odd_rank:
            for piece in pieces:
                piece.tensor.data.mul_(1.5)
        run.engine.step()
        run.engine.zero_grad()
        run.digests.append(training.digest(run.model))
        run.norms.append(run.engine.grad_norm)
    return run


def test_the_reduced_gradient_is_edited(ranks: Ranks) -> None:
    """A1: norms count every number once, however many nodes have it; an edit on one node alone is told on all ranks,
    with the piece, also one that torch does not count."""
    group = four(ranks)
    recipe = Recipe(samples=training.EVEN, max_grad_norm=0.02)
    run = edited(build("dps", group, recipe, bucket_bytes=300))
    assert all(
        piece.replicated for piece in (training.backward(run.engine, recipe, 3), run.engine.reduced_gradients())[1]
    )
    run.engine.step()
    run.engine.close()
    wanted = edited(build("single", training.alone(), recipe))
    assert run.norms == pytest.approx(wanted.norms, rel=1e-5)
    run = build("dps", group, recipe)
    with pytest.raises(DisagreementError, match=r"the reduced gradient of .*rank 1: copy 1, rank 3: copy 2.*alike"):
        edited(run, odd_rank=3)
    run.engine.zero_grad()
    go_on(run, [3])
    assert_same_bits_everywhere(Run(recipe, run.engine, run.model, run.optimizer, run.scheduler, run.digests[-1:]))
    run.engine.close()


def test_copies_of_nodes_are_compared(ranks: Ranks) -> None:
    """A4, B6: what one node alone has written, of the parameters or of the optimizer's state, is named."""
    group = four(ranks)
    recipe = Recipe(optimizer="AdamW", samples=training.EVEN)
    run = go_on(build("dps", group, recipe), range(2))
    state = next(iter(run.optimizer.state.values()))
    kept = state["exp_avg"].clone()
    if group.rank == 2:
        state["exp_avg"].add_(1)
    with pytest.raises(
        DisagreementError, match=r"the optimizer's 'exp_avg' of '.*' \[\d+:\d+\] \(rank 0: copy 1, rank 2"
    ):
        run.engine.settle()
    state["exp_avg"].copy_(kept)
    run.engine.settle()
    group.barrier()
    if group.rank == 3:
        run.engine.parameters[-1].tensor.data.add_(1)  # a write that torch does not count
    group.barrier()
    with pytest.raises(CommlabError, match=r"different copies of 'last.bias'|was written outside"):
        run.engine.settle()
    run.engine.close()


@servers
def test_update_parameters_counts_once(ranks: Ranks, strategy: str) -> None:
    """A10: with random numbers, which differ between ranks: rank 0's are everybody's, on every node."""
    group = four(ranks)
    run = go_on(build(strategy, group, Recipe()), [0])
    torch.manual_seed(group.rank)
    run.engine.update_parameters(lambda model: [each.add_(torch.randn(each.shape)) for each in model.parameters()])
    assert len(set(everyones(group, training.digest(run.model).hex()))) == 1
    go_on(run, [1])
    assert_same_bits_everywhere(run)
    run.engine.close()


@servers
def test_a_rank_that_does_something_else_is_named(ranks: Ranks, strategy: str) -> None:
    """A2, A19: one rank freezes a layer, or leaves the loop: all are told at once, and nobody waits."""
    group = four(ranks)
    run = go_on(build(strategy, group, Recipe(samples=training.EVEN)), [0])
    if group.rank == 1:
        run.model.some.requires_grad_(False)
    with pytest.raises(CommlabError, match=r"some.weight"):
        go_on(run, [1])
    run = go_on(build(strategy, group, Recipe(samples=training.EVEN)), [0])
    with pytest.raises(DisagreementError, match=r"rank 2: barrier|ranks 0-1, 3: .*'bucket 0'"):
        group.barrier() if group.rank == 2 else go_on(run, [1])


@servers
def test_a_backward_pass_that_one_rank_gives_up(ranks: Ranks, strategy: str) -> None:
    """A19: an exception in the middle of backward, caught on one rank: told on all ranks when the others' next bucket
    meets its next step; on all ranks alike, they go on."""
    group = four(ranks)
    recipe = Recipe(samples=training.EVEN, all_used=True)

    def interrupted(run: Run, step: int) -> None:
        weight = run.model.first.weight
        hook = weight.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            training.backward(run.engine, recipe, step)
        hook.remove()
        run.engine.zero_grad()

    run = build(strategy, group, recipe, bucket_bytes=100)
    interrupted(run, 0)
    assert_same(go_on(run, range(len(recipe.samples))), reference(recipe))
    run.engine.close()
    run = go_on(build(strategy, group, recipe, bucket_bytes=100), [0])
    with pytest.raises(DisagreementError, match="given up"):
        if group.rank == 1:
            interrupted(run, 1)
        go_on(run, [1])


@servers
def test_a_step_that_is_not_finite_is_skipped_on_all_nodes(ranks: Ranks, strategy: str) -> None:
    """A14: inf on one rank of one node."""
    group = four(ranks)
    run = build(strategy, group, Recipe(samples=training.EVEN), nonfinite="skip")
    before = training.digest(run.model)
    if group.rank == 2:
        run.model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * float("inf"),))
    training.backward(run.engine, run.recipe, 0)
    assert run.engine.step() is False and training.digest(run.model) == before
    run.engine.close()


@pytest.mark.parametrize("strategy, layout", [("dps", "3 nodes of 2, linked"), ("ps", "")])
def test_checkpoints(ranks: Ranks, strategy: str, layout: str) -> None:
    """Every piece is saved once, by one node; taken up by another strategy, number of ranks and nodes, and alone."""
    recipe = Recipe(max_grad_norm=0.5, optimizer="AdamW")
    folder = Path(
        gather_bytes(ranks.world, (tempfile.mkdtemp() if not ranks.rank else "").encode(), "folder")[0].decode()
    )
    group = nodes_of(ranks, "2 nodes of 2")
    if group is not None:
        run = go_on(build("dps", group, recipe, bucket_bytes=300), range(2))
        own = run.engine.state_dict()
        assert run.engine.saves_state == (group.rank < 2)
        Checkpoints(folder, run.model, run.engine, run.scheduler).save(2, {})
        run.engine.load_state_dict(own)  # a rank's own part is enough for it
        go_on(run, range(2, len(RAGGED)))
        assert_same(run, reference(recipe))
        run.engine.close()
    ranks.world.barrier()
    other = nodes_of(ranks, layout) if layout else ranks.halves(1)
    if other is not None:
        again = build(strategy, other, recipe)
        found = Checkpoints(folder, again.model, again.engine, again.scheduler).restore()
        assert found is not None and found[0] == 2
        go_on(again, range(2, len(RAGGED)))
        again.norms = reference(recipe).norms[:2] + again.norms
        assert_same(again, reference(recipe))
        again.engine.close()
    ranks.world.barrier()
    if ranks.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)


def test_what_can_not_be_is_refused_on_every_rank(ranks: Ranks) -> None:
    """With the reason and the way out; auto takes the job as the unit, and says why."""
    group = four(ranks)
    plain_group = Group(group.transport, declared("1", 4), TIMEOUT_S, cores=1)
    model = torch.nn.Linear(3, 2)

    def refused(where: Group, pattern: str, **options: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(CommlabError, match=pattern):
            commlab.strategy("dps", model, optimizer, where, **options)
        assert optimizer.param_groups[0]["params"] == list(model.parameters())

    open_nodes(plain_group)
    refused(plain_group, r"shard='node' is not to be had: nodes have \[1, 1, 1, 1\] ranks.*shard='job'", shard="node")
    refused(group, r"algorithm window joins the ranks of one node.*shard='job'", shard="node", algorithm="window")
    refused(group, r"different options: shard", shard="node" if group.rank else "job")
    for where, options, said in (
        (plain_group, {}, r"job \(nodes have \[1, 1, 1, 1\] ranks"),
        (group, {"algorithm": "ring"}, r"job \(algorithm ring was named"),
        (group, {"shard": "job"}, "job, as asked for"),
        (group, {"shard": "node"}, r"node \(as asked for\)"),
    ):
        run = go_on(build("dps", where, Recipe(), **options), [0])
        assert re.match(said, run.engine.sharding), run.engine.sharding
        assert (run.engine.across is not None) == said.startswith("node")
        run.engine.close()


def test_allreduce_reduces_where_gradients_lie(ranks: Ranks) -> None:
    """The buckets of allreduce are in each node's window: nothing is copied there and back."""
    group = four(ranks)
    run = go_on(build("allreduce", group, Recipe(max_grad_norm=0.5)), range(len(RAGGED)))
    assert run.engine.in_window and group.node is not None and group.node.window is not None
    assert all(group.node.window.locate(each.flat) is not None for each in run.engine.buckets.buckets)
    assert_same(run, reference(run.recipe))
    assert_same_bits_everywhere(run)
    large = build("allreduce", group, Recipe(), algorithm="hierarchical")
    assert_same(go_on(large, range(len(RAGGED))), reference(large.recipe))
    large.engine.close()
    run.engine.close()
