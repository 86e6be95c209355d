"""Halves of few numbers over links, as a whole allreduce: exact, at once and in the queue, and only while the network
is fast enough for the further bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from closed_form import DTYPES, HALVES, expected, numbers, ops_for
from linked import Mesh, on_all

import commlab
from commlab.chunks import split
from commlab.collectives.plan import plan_of
from commlab.collectives.routes import schedule, whole
from commlab.errors import DisagreementError
from commlab.runtime import at_once as at_once_module
from commlab.runtime.group import Group
from commlab.transport.tcp import missing_reason

pytestmark = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())

FAST_BYTE_S, SLOW_BYTE_S = 0.8e-9, 40e-9
"""10 Gbit/s, and 200 Mbit/s."""


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    mesh = Mesh(getattr(request, "param", 3))
    for links in mesh.links:
        links.byte_s = FAST_BYTE_S
    yield mesh
    mesh.close()


def halves(group: Group, numel: int, dtype: torch.dtype, op: str) -> None:
    """All four operations, with every rank as the root."""
    rank, size = group.rank, group.size
    chunks = split(numel, size)
    mine, total = numbers(rank, numel, dtype, op), expected(op, size, numel, dtype)
    out = torch.full((chunks[rank].numel,), 7, dtype=dtype)
    given = mine.clone()
    assert torch.equal(commlab.reduce_scatter(out, given, op, group=group), total[slice(*chunks[rank])])
    assert torch.equal(given, mine), "what is given was written"
    gathered = torch.full((numel,), 7, dtype=dtype)
    commlab.allgather(gathered, mine[slice(*chunks[rank])], group=group)
    assert torch.equal(gathered, torch.cat([numbers(r, numel, dtype, op)[slice(*chunks[r])] for r in range(size)]))
    for root in range(size):
        each = mine.clone()
        commlab.reduce(each, root, op, group=group)
        assert torch.equal(each, total if rank == root else mine)
        each = mine.clone()
        commlab.broadcast(each, root, group=group)
        assert torch.equal(each, numbers(root, numel, dtype, op))


def all_right(groups: list[Group], numel: int, dtype: torch.dtype, op: str) -> None:
    found = on_all(groups, lambda group: halves(group, numel, dtype, op))
    assert found == [None] * len(groups), (numel, dtype, op, found)


@pytest.mark.parametrize("mesh", [2, 3, 7], indirect=True)
def test_exact_in_one_native_call(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is queued; but 16-bit sums, which go as halves."""
    groups = mesh.groups()
    monkeypatch.setattr(at_once_module, "PATIENCE_US", 20e6)
    for dtype in DTYPES:
        for at, numel in enumerate((1, 5, 777)):
            with monkeypatch.context() as patched:
                op = "sum"  # exact where each hop rounds, too
                if dtype not in HALVES:
                    patched.setattr(Group, "_queue", None)
                    op = ops_for(dtype)[at % len(ops_for(dtype))]
                all_right(groups, numel, dtype, op)


def test_any_dtype_is_moved(mesh: Mesh) -> None:
    """Bytes that are no whole number of integers; -0.0 and NaN keep their bits."""

    def one(group: Group) -> None:
        for size_bytes in (1, 7, 8, 1001):
            data = (torch.arange(size_bytes) * 5 + group.rank).to(torch.uint8)
            commlab.broadcast(data, 2, group=group)
            assert torch.equal(data, (torch.arange(size_bytes) * 5 + 2).to(torch.uint8))
        flags = torch.arange(9) % (group.rank + 2) == 0
        commlab.broadcast(flags, 1, group=group)
        assert torch.equal(flags, torch.arange(9) % 3 == 0)
        odd = torch.tensor([-0.0, float("nan"), float("-inf")]) if group.rank == 0 else torch.ones(3)
        commlab.broadcast(odd, 0, group=group)
        assert odd.view(torch.int32).tolist() == [-(2**31), 0x7FC00000, -0x800000]

    assert on_all(mesh.groups(), one) == [None] * 3


@pytest.mark.parametrize("mesh", [4], indirect=True)
@pytest.mark.parametrize("nodes", [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 1, 2), (3,))], ids=str)
def test_by_leaders(mesh: Mesh, nodes: tuple[tuple[int, ...], ...]) -> None:
    groups = mesh.groups(nodes=nodes)
    for dtype, numel in ((torch.float32, 100), (torch.int64, 4001), (torch.bfloat16, 64), (torch.float64, 1)):
        all_right(groups, numel, dtype, "sum")


def test_numbers_that_do_not_lie_in_a_row(mesh: Mesh) -> None:
    """A transposed result, as it is and as every second number."""

    def one(group: Group) -> None:
        own, total = split(36, 3)[group.rank], expected("sum", 3, 36, torch.float64)
        for out in (torch.zeros(3, 4, dtype=torch.float64).t(), torch.zeros(3, 8, dtype=torch.float64).t()[::2]):
            commlab.reduce_scatter(out, numbers(group.rank, 36, torch.float64), "sum", group=group)
            assert torch.equal(out, total[slice(*own)].view(4, 3))
            commlab.broadcast(out, 1, group=group)
            assert torch.equal(out, total[12:24].view(4, 3))

    assert on_all(mesh.groups(), one) == [None] * 3


def test_beside_what_is_under_way(mesh: Mesh) -> None:
    """A rank that has something in its queue goes the long way, and the others don't."""

    def one(group: Group) -> None:
        for turn in range(9):
            handle = commlab.allreduce_async(numbers(group.rank, 40_000, torch.int32), "sum", group=group)
            if turn % 3 != group.rank:
                handle.wait()
            halves(group, 100 + turn, torch.float32, "sum")
            assert torch.equal(handle.wait(), expected("sum", 3, 40_000, torch.int32))

    assert on_all(mesh.groups(), one) == [None] * 3


def test_roots_that_differ(mesh: Mesh) -> None:
    """A disagreement on all ranks, nothing is written, and the group goes on."""

    def one(group: Group) -> None:
        for call in (
            lambda data: commlab.broadcast(data, group.rank % 2, group=group),
            lambda data: commlab.reduce(data, group.rank % 2, "sum", group=group),
        ):
            data = numbers(group.rank, 50, torch.float32)
            with pytest.raises(DisagreementError, match="chunks to"):
                call(data)
            assert torch.equal(data, numbers(group.rank, 50, torch.float32))
        halves(group, 50, torch.float32, "sum")

    assert on_all(mesh.groups(), one) == [None] * 3


def test_inference_and_gradients(mesh: Mesh) -> None:
    """What is written knows it, also where autograd does not follow."""

    def one(group: Group) -> None:
        with torch.inference_mode():
            kept = torch.full((6,), float(group.rank))
        commlab.broadcast(kept, 1, group=group)
        assert kept.tolist() == [1.0] * 6
        leaf = torch.nn.Parameter(torch.full((6,), float(group.rank)))
        version = leaf._version
        commlab.reduce(leaf, 2, "sum", group=group)
        assert leaf.tolist() == [3.0 if group.rank == 2 else float(group.rank)] * 6
        assert (leaf._version > version) == (group.rank == 2)

    assert on_all(mesh.groups(), one) == [None] * 3


@pytest.mark.parametrize("mesh", [2, 4], indirect=True)
def test_while_the_network_is_fast_enough(mesh: Mesh) -> None:
    """Never where an algorithm was named; by the network and the ranks alone, so all ranks choose alike."""
    groups = mesh.groups()

    def way(numel: int, kind: str = "allgather", algorithm: str = "auto", dtype: torch.dtype = torch.float32) -> object:
        flat = torch.zeros(numel, dtype=dtype)
        routes = {
            plan_of(group, kind, flat, "sum", None, algorithm, chunks=split(numel, mesh.size)).route for group in groups
        }
        assert len(routes) == 1
        return routes.pop()

    most = min(whole.MOST_BYTES, int(whole.SAVED_S / FAST_BYTE_S / (mesh.size - 1))) // 4
    assert way(most) is way(most, "reduce_scatter") is way(8) is whole
    assert way(most + 2) is way(most + 2, "reduce_scatter") is way(8, algorithm="ring") is schedule
    assert way(8, "reduce_scatter", dtype=torch.float16) is schedule
    for links, group in zip(mesh.links, groups, strict=True):
        links.byte_s = SLOW_BYTE_S
        group.forget_plans()
    slow = int(whole.SAVED_S / SLOW_BYTE_S / (mesh.size - 1)) // 4
    assert way(slow) is whole and way(slow + 2) is schedule
