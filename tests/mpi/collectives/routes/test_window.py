"""Collectives in the window on 2..8 ranks: exact wherever the data lie, the same bits always, and nobody sends."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from closed_form import DTYPES, HALVES, expected, numbers, ops_for, same_bits
from mpi_ranks import Ranks
from mpi_windows import close_all, in_window, mixed, odd, ordinary, window_group, window_groups
from torch import Tensor

import commlab
from commlab.chunks import Range, split, whole_at
from commlab.collectives.halves import gather_chunks_async, reduce_chunks_async
from commlab.runtime import at_once as at_once_module
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group
from commlab.window.loops import INLINE_BYTES, fits_rooms

LARGE = 100_003
MANY_BLOCKS = 1_300_001


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_all()


PLACES: dict[str, Callable[[Group, Tensor], Tensor]] = {
    "in the window": in_window,
    "ordinary": ordinary,
    "odd offsets": odd,
    "mixed": mixed,
}
places = pytest.mark.parametrize("place", PLACES)


def rounding(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Numbers whose sums round, distinct per rank and index."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(numel, generator=generator) * 10 ** (rank % 3)).to(dtype)


def in_rank_order(size: int, numel: int, dtype: torch.dtype, divisor: float, into: torch.dtype | None = None) -> Tensor:
    """The documented rounding: added in rank order, 16-bit numbers in fp32, divided, rounded once."""
    total = rounding(0, numel, dtype).to(torch.float32 if dtype in HALVES else dtype)
    for rank in range(1, size):
        total = total + rounding(rank, numel, dtype).to(total.dtype)
    return (total / divisor).to(into or dtype)


@places
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_allreduce(ranks: Ranks, place: str, dtype: torch.dtype) -> None:
    """Around what travels in the control page, and far above."""
    wrong = []
    at_once = INLINE_BYTES // dtype.itemsize
    turn = list(PLACES).index(place) + DTYPES.index(dtype)
    for group in window_groups(ranks):
        sent = group.bytes_sent
        for at, op in enumerate(ops_for(dtype)):
            numels = [0, 1, 2, 5, 64, 1000, at_once, at_once + 1]
            # One op of each dtype and place with a large tensor; all of them in some dtype and place.
            numels += [LARGE] if at == turn % len(ops_for(dtype)) else []
            for numel in numels:
                mine = PLACES[place](group, numbers(group.rank, numel, dtype, op))
                got = commlab.allreduce(mine, op, group=group)
                if got is not mine or not torch.equal(got, expected(op, group.size, numel, dtype)):
                    wrong.append((group.size, op, numel))
        assert group.bytes_sent == sent, "somebody sent something"
    assert not wrong


@places
def test_many_blocks(ranks: Ranks, place: str) -> None:
    """More than the staging area holds at a time."""
    half = ranks.size // 2
    for parts in ([range(ranks.size)], [range(half), range(half, ranks.size)]):
        group = next(filter(None, [window_group(ranks, *part) for part in parts if part]))
        if group.size == 1:
            continue
        got = commlab.allreduce(PLACES[place](group, numbers(group.rank, MANY_BLOCKS, torch.int32)), "sum", group=group)
        assert torch.equal(got, expected("sum", group.size, MANY_BLOCKS, torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("numel", [777, 50_001])
def test_the_same_bits_on_all_ranks_in_every_place_every_time(ranks: Ranks, dtype: torch.dtype, numel: int) -> None:
    for group in window_groups(ranks):
        want = in_rank_order(group.size, numel, dtype, group.size)
        for place in (*PLACES.values(), in_window):
            got = commlab.allreduce(place(group, rounding(group.rank, numel, dtype)), group=group)
            assert same_bits(got, want), (group.size, place)


@pytest.mark.parametrize("wire", ["fp16", "bf16"])
@places
def test_a_wire_rounds_once_on_each_side(ranks: Ranks, wire: str, place: str) -> None:
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[wire]
    for group in window_groups(ranks):
        for dtype, numel in ((torch.float32, 5), (torch.float32, 5001), (torch.float32, 50_001), (torch.float64, 777)):
            everyone = [rounding(rank, numel, dtype).to(half).float() for rank in range(group.size)]
            total = everyone[0]
            for other in everyone[1:]:
                total = total + other
            for op, divisor in (("sum", 1), ("mean", group.size)):
                mine = PLACES[place](group, rounding(group.rank, numel, dtype))
                got = commlab.allreduce(mine, op, wire=wire, group=group)
                assert got is mine
                assert same_bits(got, (total / divisor).to(half).to(dtype)), (group.size, op, numel)


def test_the_mean_of_60000s_is_60000(ranks: Ranks) -> None:
    for group in window_groups(ranks):
        for numel in (10, 3000):
            for mine, wire in (
                (torch.full((numel,), 60000.0), "fp16"),
                (torch.full((numel,), 60000.0, dtype=torch.float64), "fp16"),
                (torch.full((numel,), 60000.0, dtype=torch.float16), None),
                (in_window(group, torch.full((numel,), 60000.0, dtype=torch.float16)), None),
            ):
                assert (commlab.allreduce(mine, wire=wire, group=group) == 60000).all(), (group.size, mine.dtype)
            # bf16 has no 60000; its nearest number stays as it is.
            got = commlab.allreduce(torch.full((numel,), 60000.0), wire="bf16", group=group)
            assert (got == torch.tensor(60000.0).bfloat16().float()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64], ids=str)
def test_reduce_scatter_and_allgather(ranks: Ranks, dtype: torch.dtype) -> None:
    for group in window_groups(ranks):
        for numel in (0, 1, 5, 64, 1025, 20_011):
            own = split(numel, group.size)[group.rank]
            for op in ("sum", "mean", "min") if dtype.is_floating_point else ("sum", "prod"):
                mine = numbers(group.rank, numel, dtype, op)
                part = torch.full((own.numel,), 99, dtype=dtype)
                assert commlab.reduce_scatter(part, mine, op, group=group) is part
                assert torch.equal(part, expected(op, group.size, numel, dtype)[slice(*own)]), (group.size, numel, op)
                assert torch.equal(mine, numbers(group.rank, numel, dtype, op)), "the contribution was changed"
            parts = [numbers(rank, numel, dtype)[slice(*chunk)] for rank, chunk in enumerate(split(numel, group.size))]
            for whole in (
                torch.full((numel,), 99, dtype=dtype),
                in_window(group, torch.full((numel,), 99, dtype=dtype)),
            ):
                assert commlab.allgather(whole, parts[group.rank], group=group) is whole
                assert torch.equal(whole, torch.cat(parts)), (group.size, numel)


@places
def test_every_root(ranks: Ranks, place: str) -> None:
    for group in window_groups(ranks):
        for root in range(group.size):
            for numel in (1, 1025) if root else (0, 1, 1025, LARGE):
                mine = PLACES[place](group, numbers(group.rank, numel, torch.float32))
                assert commlab.broadcast(mine, root, group=group) is mine
                assert torch.equal(mine, numbers(root, numel, torch.float32)), (group.size, root, numel)

                given = numbers(group.rank, numel, torch.float32)
                mine = PLACES[place](group, given)
                assert commlab.reduce(mine, root, "mean", group=group) is mine
                want = expected("mean", group.size, numel, torch.float32) if group.rank == root else given
                assert torch.equal(mine, want), (group.size, root, numel)


@places
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_push_and_a_pull(ranks: Ranks, place: str, dtype: torch.dtype) -> None:
    """Any chunks, some of them empty. Sums of 16-bit numbers arrive in fp32, and were never rounded."""
    for group in window_groups(ranks):
        numel = 4001
        uneven = [Range(0, 0) if rank == 0 else Range((rank - 1) * 17, rank * 17) for rank in range(group.size - 1)]
        uneven.append(Range(uneven[-1].stop, numel))
        for chunks in (split(numel, group.size, align=16), tuple(uneven), whole_at(group.size - 1, numel, group.size)):
            own = chunks[group.rank]
            given = rounding(group.rank, numel, dtype)
            mine = PLACES[place](group, given)
            part = reduce_chunks_async(mine, chunks, "mean", group=group).wait()
            want = in_rank_order(group.size, numel, dtype, group.size, torch.float32)
            assert same_bits(part, want[own.start : own.stop]), (group.size, chunks)
            others = torch.ones(numel, dtype=torch.bool)
            others[own.start : own.stop] = False
            assert torch.equal(mine[others], given[others]), "another's chunk was written"

            mine = PLACES[place](group, given)
            gather_chunks_async(mine, chunks, group=group).wait()
            for rank, chunk in enumerate(chunks):
                assert torch.equal(mine[slice(*chunk)], rounding(rank, numel, dtype)[slice(*chunk)]), (group.size, rank)


def test_any_strides(ranks: Ranks) -> None:
    """What is not flat is copied, on the ranks where it is not."""
    for group in window_groups(ranks):
        for numel in (24, 24_000):
            mine = in_window(group, numbers(group.rank, numel, torch.float32)).view(4, -1)
            if group.rank % 3 == 1:
                mine = mine.t().contiguous().t()
            elif group.rank % 3 == 2:
                mine = torch.nn.functional.pad(mine, (0, 1))[:, :-1]
            commlab.allreduce(mine, "sum", group=group)
            assert torch.equal(mine, expected("sum", group.size, numel, torch.float32).view(4, -1))
        point = in_window(group, torch.tensor(float(group.rank)))
        assert commlab.allreduce(point, "max", group=group) == group.size - 1
        weight = torch.nn.Parameter(torch.full((40, 50), float(group.rank)))
        commlab.allreduce(weight, "sum", group=group)
        assert (weight == group.size * (group.size - 1) / 2).all()


def test_handles_in_any_order(ranks: Ranks) -> None:
    for group in window_groups(ranks):
        numels = [1000, 1, LARGE, 0, 64, 5000]
        shared = in_window(group, numbers(group.rank, 5000, torch.float64))
        data = [shared if numel == 5000 else numbers(group.rank, numel, torch.float64) for numel in numels]
        handles = [commlab.allreduce_async(each, "sum", f"t{at}", group=group) for at, each in enumerate(data)]
        order = [3, 5, 0, 4, 1, 2] if group.rank % 2 else [4, 2, 3, 5, 0, 1]
        for at in order:
            assert torch.equal(handles[at].wait(), expected("sum", group.size, numels[at], torch.float64)), at
        assert all(handle.done() for handle in handles)


def test_done_helps_operations_on(ranks: Ranks) -> None:
    """Without ever waiting: ranks that share a core go on in turn."""
    for group in window_groups(ranks):
        handles = [
            commlab.allreduce_async(numbers(group.rank, numel, torch.float32), "sum", group=group)
            for numel in (5, 5000, 300_000, 64)
        ]
        while not all(handle.done() for handle in handles):
            os.sched_yield()
        for handle, numel in zip(handles, (5, 5000, 300_000, 64), strict=True):
            assert torch.equal(handle.wait(), expected("sum", group.size, numel, torch.float32))


def test_all_that_is_awaited_is_one_native_call(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is queued, but the first operation by which a rank maps another one's memory; and a late rank, for which
    the others go on waiting in the queue, changes nothing."""
    for group in window_groups(ranks):
        size = group.size
        commlab.allreduce(torch.ones(200_000), group=group)
        commlab.allreduce(in_window(group, torch.ones(200_000)), group=group)
        with monkeypatch.context() as patched:
            patched.setattr(Group, "_queue", None)
            patched.setattr(at_once_module, "PATIENCE_US", 20e6)
            for numel in (5, 30_000, 300_000):
                own = split(numel, size)[group.rank]
                mine = numbers(group.rank, numel, torch.int32)
                want = expected("sum", size, numel, torch.int32)
                assert torch.equal(commlab.allreduce(mine.clone(), "sum", group=group), want)
                part = commlab.reduce_scatter(mine.new_empty(own.numel), mine, "sum", group=group)
                assert torch.equal(part, want[slice(*own)])
                assert torch.equal(commlab.allgather(mine.new_empty(numel), part, group=group), want)
                commlab.barrier(group)
                at_root = commlab.reduce(mine.clone(), size - 1, "sum", group=group)
                assert torch.equal(at_root, want if group.rank == size - 1 else mine)
                commlab.broadcast(at_root, size - 1, group=group)
                assert torch.equal(at_root, want)
        with monkeypatch.context() as patched:
            patched.setattr(at_once_module, "PATIENCE_US", 1e3)
            for late in range(min(size, 3)):
                for call in (lambda: commlab.barrier(group), lambda: commlab.broadcast(torch.ones(9), group=group)):  # noqa: B023
                    if group.rank == late:
                        time.sleep(0.02)
                    call()
                ones = commlab.reduce(torch.ones(30_000), 0, "sum", group=group)
                assert (ones == (size if group.rank == 0 else 1)).all()


def test_a_barrier_among_other_operations(ranks: Ranks) -> None:
    group = window_group(ranks, *range(ranks.size))
    assert group is not None
    with pytest.raises(
        commlab.DisagreementError, match=r"barrier #\d+;? .*allreduce #\d+ of float32\[3\]|allreduce.*barrier"
    ):
        if group.rank == 1:
            commlab.barrier(group)
        else:
            commlab.allreduce(torch.ones(3), group=group)
    commlab.barrier(group)


def test_500_operations_in_a_row(ranks: Ranks) -> None:
    """Small and large, of every kind, in every place, in an order drawn alike on all ranks."""
    group = window_group(ranks, *range(ranks.size))
    assert group is not None
    draw = random.Random(7)
    size, mine = group.size, float(group.rank + 1)
    total = size * (size + 1) / 2
    pending: list[tuple[commlab.Handle, float]] = []
    memories = [commlab.empty(20_000, group=group) for _ in range(3)]
    for turn in range(500):
        numel = draw.choice((1, 3, 700, 1024, 1025)) if draw.random() < 0.9 else draw.randrange(2000, 20_000)
        kind, where, wait = draw.randrange(5), draw.randrange(3), draw.random() < 0.6
        # A memory of its own for each operation under way.
        tensor = torch.empty(numel) if where == 2 else memories[len(pending)][:numel]
        tensor.fill_(mine + turn)
        if kind <= 1:
            handle = commlab.allreduce_async(tensor, "sum" if kind else "max", group=group)
            pending.append((handle, total + size * turn if kind else size + turn))
        elif kind == 2:
            root = turn % size
            handle = gather_chunks_async(tensor, whole_at(root, numel, size), group=group)
            pending.append((handle, root + 1.0 + turn))
        elif kind == 3:
            handle = reduce_chunks_async(tensor, split(numel, size), "sum", group=group)
            pending.append((handle, total + size * turn))
        else:
            group.barrier()
        while len(pending) == 3 or (wait and pending):
            handle, want = pending.pop(0)
            assert (handle.wait() == want).all(), turn
            memories.append(memories.pop(0))
    for handle, want in pending:
        assert (handle.wait() == want).all()


def test_what_the_loops_read_and_write_is_counted(ranks: Ranks) -> None:
    """In place each rank reads its shard P times and writes it P times. Through blocks it also copies the others'
    shards in and out, and writes what it reduces twice; so goes what is large, and the first that is not. All at once
    it copies all of it and reads what everyone has."""
    for group in window_groups(ranks):
        size = group.size
        commlab.allreduce(torch.ones(20_000), group=group)
        for numel, place, read, written in (
            (20_000, in_window, size, size),
            (200_000, in_window, size, size),
            (
                20_000,
                ordinary,
                size * (size + 1) if fits_rooms(80_000, size, group.crowded) else 3 * size - 2,
                2 * size,
            ),
            (200_000, ordinary, 3 * size - 2, 2 * size),
        ):
            for wait in (True, False):
                before = group.node_bytes_read, group.node_bytes_written
                mine = place(group, torch.ones(numel))
                if wait:
                    commlab.allreduce(mine, group=group)
                else:
                    commlab.allreduce_async(mine, group=group).wait()
                row = [group.node_bytes_read - before[0], group.node_bytes_written - before[1]]
                everyone = [json.loads(each) for each in gather_bytes(group, json.dumps(row).encode(), "counts")]
                assert torch.tensor(everyone).sum(0).tolist() == [read * 4 * numel, written * 4 * numel]
