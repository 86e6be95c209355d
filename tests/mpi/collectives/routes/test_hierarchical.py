"""Algorithm hierarchical on declared nodes: exact, the same bits on all ranks, and only shards cross between nodes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
import torch
import training
from closed_form import (
    DTYPES,
    HALVES,
    UNIT_ROUNDOFF,
    expected,
    hop_tolerance,
    numbers,
    ops_for,
    reference,
)
from mpi_ranks import TIMEOUT_S, Ranks
from training import Recipe, assert_same, train

import commlab
from commlab.errors import UsageError
from commlab.job import topology
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group
from commlab.runtime.nodes import open_nodes, open_window

LARGE = 40_003
LAYOUTS = {
    "2 nodes of 2, twice": (((0, 1, 2, 3), "2"), ((4, 5, 6, 7), "0-1,2-3")),
    "2 nodes of 3": (((0, 1, 2, 3, 4, 5), "0-2,3-5"),),
    "3 nodes of 2": (((7, 6, 5, 4, 3, 2), "2"),),
    "4 nodes of 2": (((0, 1, 2, 3, 4, 5, 6, 7), "2"),),
    "2 nodes of 4": (((0, 1, 2, 3, 4, 5, 6, 7), "4"),),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
UNEVEN = "nodes have {} ranks: hierarchical wants equally many, and more than one"

_made: dict[tuple[Group, str], Group | None] = {}


def declared(ranks: Ranks, members: tuple[int, ...], nodes: str) -> Group | None:
    """A group of these ranks on nodes that are declared, as ``commlab.init(nodes=...)`` makes "
    "it. Collective over all."""
    part = ranks.subgroup(members)
    if part is None:
        return None
    part.progress.close()
    group = Group(part.transport, topology.declared(nodes, len(members)), TIMEOUT_S)
    open_nodes(group)
    return group


def group_of(ranks: Ranks, layout: str) -> Group | None:
    """This rank's group of a layout, kept for the next test."""
    ranks.need(8)
    key = ranks.world, layout
    if key not in _made:
        made = [declared(ranks, members, nodes) for members, nodes in LAYOUTS[layout]]
        _made[key] = next((group for group in made if group is not None), None)
    return _made[key]


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    for group in _made.values():
        if group is not None:
            group.close()
    _made.clear()


def placed(group: Group, data: torch.Tensor, shared: bool) -> torch.Tensor:
    return commlab.empty(data.shape, data.dtype, group.node).copy_(data) if shared else data


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_allreduce(ranks: Ranks, layout: str, dtype: torch.dtype) -> None:
    group = group_of(ranks, layout)
    if group is None:
        return
    assert group.node is not None and group.across is not None
    assert (group.node.size, group.across.size) == (group.local_size, len(group.nodes))
    wrong = []
    for op in ops_for(dtype):
        for numel in (0, 1, 2, 5, 64, 1000, *((LARGE,) if op in ("sum", "mean") else ())):
            mine = numbers(group.rank, numel, dtype, op)
            got = commlab.allreduce(mine, op, algorithm="hierarchical", group=group)
            # Divided by P on the node before it is rounded, and once more rounded for each other node at most.
            tolerance = hop_tolerance(len(group.nodes), dtype) if op == "mean" and dtype in HALVES else 0
            want = expected(op, group.size, numel, dtype).double()
            if got is not mine or ((got.double() - want).abs() > tolerance).any():
                wrong.append((op, numel))
    assert not wrong


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_same_bits_on_all_ranks_in_every_place_every_time(ranks: Ranks, layout: str, dtype: torch.dtype) -> None:
    group = group_of(ranks, layout)
    if group is None:
        return
    generator = torch.Generator().manual_seed(group.rank)
    given = (torch.randn(5001, generator=generator) * 10 ** (group.rank % 3)).to(dtype)
    results = []
    for shared in (False, True, group.rank % 2 == 0, False):
        mine = placed(group, given.clone(), shared)
        commlab.allreduce(mine, algorithm="hierarchical", group=group)
        results += gather_bytes(group, mine.view(torch.uint8).numpy().tobytes(), "result")
    assert len(set(results)) == 1
    everyone = gather_bytes(group, given.view(torch.uint8).numpy().tobytes(), "given")
    parts = [torch.frombuffer(bytearray(part), dtype=dtype) for part in everyone]
    total = torch.stack([part.double() for part in parts])
    # u of a partial sum, divided, for each addition; of the mean for each rounding to the wire; and of the reference.
    roundings = group.size + 1 if dtype == torch.float32 else 1.01 * (len(group.nodes) + 1)
    limit = 1.1 * roundings * UNIT_ROUNDOFF[dtype] * total.abs().sum(0) / group.size
    got = torch.frombuffer(bytearray(results[0]), dtype=dtype)
    assert ((got.double() - total.mean(0)).abs() <= limit).all()


@layouts
@pytest.mark.parametrize("wire", ["fp16", "bf16"])
def test_wire(ranks: Ranks, layout: str, wire: str) -> None:
    group = group_of(ranks, layout)
    if group is None:
        return
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[wire]
    everyone = torch.randint(-(2**15), 2**15, (group.size, 777), generator=torch.Generator().manual_seed(1)) / 1024
    for op, divisor in (("sum", 1), ("mean", group.size)):
        for dtype in (torch.float32, torch.float64):
            got = commlab.allreduce(
                everyone[group.rank].to(dtype, copy=True), op, algorithm="hierarchical", wire=wire, group=group
            )
            rounded = everyone.to(half)
            want = reference(list(rounded), op).double()
            limit = 1.1 * (len(group.nodes) + 1) * UNIT_ROUNDOFF[half] * rounded.double().abs().sum(0) / divisor
            assert ((got.double() - want).abs() <= limit).all()
    large = commlab.allreduce(torch.full((777,), 60000.0), algorithm="hierarchical", wire="fp16", group=group)
    assert (large == 60000).all()


@layouts
def test_only_shards_cross_between_nodes(ranks: Ranks, layout: str) -> None:
    """A node sends as if it were one rank: over all ranks 2 n (N-1) numbers, and each rank its part of them."""
    group = group_of(ranks, layout)
    if group is None:
        return
    assert group.node is not None
    numel = 48_000
    before, read = group.bytes_sent, group.node_bytes_read
    commlab.allreduce(numbers(group.rank, numel, torch.float32), "sum", group=group)  # auto: it is large enough
    mine = group.bytes_sent - before
    sent = [int(row) for row in gather_bytes(group, str(mine).encode(), "bytes sent")]
    assert sum(sent) == 4 * 2 * numel * (len(group.nodes) - 1)
    even = sum(sent) / group.size
    assert all(abs(each - even) <= 4 * 2 * 16 * len(group.nodes) for each in sent), sent
    assert group.node_bytes_read > read, "the node's loops did nothing"


@layouts
def test_auto_chooses_it_for_large_allreduces_alone(ranks: Ranks, layout: str) -> None:
    group = group_of(ranks, layout)
    if group is None:
        return
    assert group.node is not None
    for kind, numel, chosen in (
        ("allreduce", 16_385, True),
        ("allreduce", 16_384, False),
        ("broadcast", 20_000, False),
        ("reduce_scatter", 20_000, False),
    ):
        before = group.node_bytes_read
        mine = numbers(group.rank, numel, torch.float32)
        if kind == "allreduce":
            assert torch.equal(
                commlab.allreduce(mine, "sum", group=group), expected("sum", group.size, numel, mine.dtype)
            )
        elif kind == "broadcast":
            assert torch.equal(commlab.broadcast(mine, 1, group=group), numbers(1, numel, mine.dtype))
        else:
            own = commlab.chunks.split(numel, group.size)[group.rank]
            part = commlab.reduce_scatter(torch.empty(own.numel), mine, "sum", group=group)
            assert torch.equal(part, expected("sum", group.size, numel, mine.dtype)[slice(*own)])
        assert (group.node_bytes_read > before) is chosen, (kind, numel)
    with pytest.raises(UsageError, match="hierarchical is for allreduce, not for broadcast"):
        commlab.broadcast(torch.ones(5), algorithm="hierarchical", group=group)
    with pytest.raises(UsageError, match=r"algorithm window is not to be had"):
        commlab.allreduce(torch.ones(5), algorithm="window", group=group)


@layouts
def test_operations_under_way_at_once(ranks: Ranks, layout: str) -> None:
    """Through nodes and by messages, waited for in any order."""
    group = group_of(ranks, layout)
    if group is None:
        return
    kinds = ("hierarchical", "ring", "hierarchical", "direct", "hierarchical", "tree")
    numels = (5000, 64, 1, 1000, LARGE, 5)
    handles = [
        commlab.allreduce_async(numbers(group.rank, numel, torch.int64), "sum", algorithm=kind, group=group)
        for kind, numel in zip(kinds, numels, strict=True)
    ]
    for at in (2, 5, 0, 3, 1, 4) if group.rank % 2 else (4, 1, 3, 0, 5, 2):
        assert torch.equal(handles[at].wait(), expected("sum", group.size, numels[at], torch.int64))


def test_disagreement(ranks: Ranks) -> None:
    group = group_of(ranks, "4 nodes of 2")
    assert group is not None
    mine = numbers(group.rank, 20_000, torch.float32)
    with pytest.raises(commlab.DisagreementError, match=r"\(sum, hierarchical,.*rank 3: .*\(max, hierarchical,"):
        commlab.allreduce(mine, "max" if group.rank == 3 else "sum", algorithm="hierarchical", group=group)
    assert torch.equal(mine, numbers(group.rank, 20_000, torch.float32)), "it was touched"
    assert torch.equal(commlab.allreduce(mine, "sum", group=group), expected("sum", 8, 20_000, torch.float32))


@pytest.mark.parametrize(
    "nodes, reason",
    [
        ("0-2,3-7", UNEVEN.format([3, 5])),
        ("3", UNEVEN.format([2, 3, 3])),
        ("1", UNEVEN.format([1] * 8)),
        ("8", "all ranks are on one node, where algorithm window needs no second level"),
    ],
)
def test_nodes_that_will_not_do_are_refused_by_name(ranks: Ranks, nodes: str, reason: str) -> None:
    ranks.need(8)
    part = ranks.subgroup(range(8))
    assert part is not None
    part.progress.close()
    group = Group(part.transport, topology.declared(nodes, 8), TIMEOUT_S)
    if nodes == "8":
        open_window(group)
    else:
        open_nodes(group)
    with pytest.raises(UsageError, match=f"rank {group.rank}: algorithm hierarchical .*{re.escape(reason)}"):
        commlab.allreduce(torch.ones(5), algorithm="hierarchical", group=group)
    for numel in (5, 20_000):
        got = commlab.allreduce(numbers(group.rank, numel, torch.float32), "sum", group=group)
        assert torch.equal(got, expected("sum", 8, numel, torch.float32))
    group.close()


def test_where_one_node_has_no_window_none_has(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.need(8)
    if ranks.rank == 5:

        def full(fd: int, offset: int, size_bytes: int) -> None:
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "posix_fallocate", full)
    group = declared(ranks, tuple(range(8)), "2")
    assert group is not None
    assert group.node is None and group.across is None
    with pytest.raises(UsageError, match=r"hierarchical .*no 0 MiB of shared memory for control page: No space left"):
        commlab.allreduce(torch.ones(5), algorithm="hierarchical", group=group)
    got = commlab.allreduce(numbers(group.rank, 20_000, torch.float32), "sum", group=group)
    assert torch.equal(got, expected("sum", 8, 20_000, torch.float32))
    group.close()


@pytest.mark.parametrize("layout", ["2 nodes of 2, twice", "2 nodes of 3"])
def test_training_equals_single(ranks: Ranks, layout: str) -> None:
    recipe = Recipe(max_grad_norm=0.5, accumulation=2)
    group = group_of(ranks, layout)
    if group is None:
        return
    for strategy, algorithm in (("allreduce", "hierarchical"), ("dps", "auto"), ("ps", "auto")):
        run = train(strategy, group, recipe, algorithm=algorithm, bucket_bytes=400)
        everyone = gather_bytes(group, b"".join(run.digests), "digests")
        assert len(set(everyone)) == 1
        assert_same(run, training.reference(recipe))
    for strategy in ("dps", "ps"):
        with pytest.raises(
            UsageError, match=f"hierarchical is for allreduce, and strategy {strategy} pushes and pulls"
        ):
            train(strategy, group, recipe, algorithm="hierarchical")


def test_closing_a_group_closes_its_nodes(ranks: Ranks) -> None:
    ranks.need(8)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        group = declared(ranks, tuple(range(8)), "2")
        assert group is not None and group.node is not None
        commlab.allreduce(torch.ones(20_000), group=group)
        group.close()
        del group
    assert len(os.listdir("/proc/self/fd")) == before
