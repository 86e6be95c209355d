"""The collectives on 1..8 ranks: exact for data that differs per rank and index; the same bits everywhere, always."""

from __future__ import annotations

import pytest
import torch
from closed_form import (
    DTYPES,
    HALVES,
    NUMELS,
    UNIT_ROUNDOFF,
    divided_first,
    expected,
    hop_tolerance,
    numbers,
    ops_for,
    reference,
    same_bits,
)
from mpi_groups import algorithms, all_groups
from mpi_ranks import Ranks

import commlab
from commlab.chunks import split
from commlab.collectives.halves import reduce_chunks_async
from commlab.job.topology import Topology
from commlab.runtime.control import exchange_records, gather_bytes
from commlab.runtime.group import Group
from commlab.schedules import ALGORITHMS

LARGE = 100_003


@algorithms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_allreduce(ranks: Ranks, algorithm: str, dtype: torch.dtype) -> None:
    wrong = []
    # Sum and mean in every combination; every other (op, numel, dtype) with one algorithm: none looks at the op.
    turn = list(ALGORITHMS).index(algorithm) + DTYPES.index(dtype)
    for group in all_groups(ranks):
        for place, op in enumerate(ops_for(dtype)):
            numels = [
                n for at, n in enumerate((*NUMELS, LARGE)) if op in ("sum", "mean") or (at + place + turn) % 4 == 0
            ]
            # Without the check operations follow one another with nothing in between; that must be right too.
            group.agreement.required = op == "sum"
            data = [numbers(group.rank, numel, dtype, op) for numel in numels]
            handles = [commlab.allreduce_async(each, op, algorithm=algorithm, group=group) for each in data]
            for numel, handle, given in zip(numels, handles, data, strict=True):
                got = handle.wait()
                want = expected(op, group.size, numel, dtype)
                tolerance = hop_tolerance(group.size, dtype) if divided_first(op, dtype, algorithm) else 0
                if got is not given or ((got.double() - want.double()).abs() > tolerance).any():
                    wrong.append((group.size, op, numel))
        group.agreement.required = True
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_auto_chooses(ranks: Ranks, dtype: torch.dtype) -> None:
    """Also in the window, if ranks share one. On up to 16 ranks 16-bit numbers are rounded once, so this is exact."""
    for group in (ranks.world, ranks.halves(3)):
        for op in ops_for(dtype):
            for numel in (0, 1, 5, 1000, LARGE):
                got = commlab.allreduce(numbers(group.rank, numel, dtype, op), op, group=group)
                assert torch.equal(got, expected(op, group.size, numel, dtype)), (group.size, op, numel)


@algorithms
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_same_bits_on_all_ranks_and_every_time(ranks: Ranks, algorithm: str, dtype: torch.dtype) -> None:
    """On numbers whose sums round."""
    for group in all_groups(ranks):
        generator = torch.Generator().manual_seed(group.rank)
        mine = (torch.randn(5001, generator=generator) * 10 ** (group.rank % 3)).to(dtype)
        first, again = mine.clone(), mine.clone()
        commlab.allreduce(first, algorithm=algorithm, group=group)
        commlab.allreduce(again, algorithm=algorithm, group=group)
        everyone = gather_bytes(group, first.view(torch.uint8).numpy().tobytes(), "result")
        assert same_bits(first, again)
        assert len(set(everyone)) == 1


@algorithms
@pytest.mark.parametrize("wire", ["fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wire(ranks: Ranks, algorithm: str, wire: str, dtype: torch.dtype) -> None:
    """Contributions and result are rounded to the wire; ``direct`` rounds only there (test_direct_rounds_once: why)."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[wire]
    for group in all_groups(ranks):
        for op in ("sum", "mean"):
            generator = torch.Generator().manual_seed(1)
            everyone = torch.randint(-(2**15), 2**15, (group.size, 777), generator=generator).to(dtype) / 1024
            mine = everyone[group.rank].clone()
            got = commlab.allreduce(mine, op, algorithm=algorithm, wire=wire, group=group)
            assert got is mine
            rounded = everyone if group.size == 1 else everyone.to(half)
            want = reference(list(rounded), op).double()
            if algorithm == "direct" or group.size == 1:
                tolerance = torch.zeros(())
            else:
                # Per hop u of a partial sum, which is at most the sum of the absolute values, divided first for a
                # mean; and u of the contributions (mean) and of the reference.
                largest = rounded.double().abs().sum(0) / (group.size if op == "mean" else 1)
                tolerance = 1.1 * (group.size + 1) * UNIT_ROUNDOFF[half] * largest
            assert ((got.double() - want).abs() <= tolerance).all(), (group.size, op)


@algorithms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32], ids=str)
def test_reduce_scatter_and_allgather(ranks: Ranks, algorithm: str, dtype: torch.dtype) -> None:
    """Ragged: the sizes are no multiples of the number of ranks, and smaller than it too."""
    for group in all_groups(ranks):
        for numel in (0, 1, 5, 64, 1000):
            own = split(numel, group.size)[group.rank]
            for op in ("sum", "mean", "min") if dtype.is_floating_point else ("sum", "prod"):
                mine = numbers(group.rank, numel, dtype, op)
                part = torch.full((own.numel,), 99, dtype=dtype)
                got = commlab.reduce_scatter(part, mine, op, algorithm=algorithm, group=group)
                want = expected(op, group.size, numel, dtype)[own.start : own.stop]
                tolerance = hop_tolerance(group.size, dtype) if divided_first(op, dtype, algorithm) else 0
                assert got is part
                assert ((got.double() - want.double()).abs() <= tolerance).all(), (group.size, numel, op)
                assert torch.equal(mine, numbers(group.rank, numel, dtype, op)), "the contribution was changed"

            whole = torch.full((numel,), 99, dtype=dtype)
            parts = [numbers(rank, numel, dtype)[slice(*chunk)] for rank, chunk in enumerate(split(numel, group.size))]
            assert commlab.allgather(whole, parts[group.rank], algorithm=algorithm, group=group) is whole
            assert torch.equal(whole, torch.cat(parts)), (group.size, numel)


@algorithms
def test_every_root(ranks: Ranks, algorithm: str) -> None:
    for group in all_groups(ranks):
        for root in range(group.size):
            for numel in (1, 65) if root else (0, 1, 65, LARGE):
                given = numbers(group.rank, numel, torch.float32)
                everywhere = given.clone()
                assert commlab.broadcast(everywhere, root, algorithm=algorithm, group=group) is everywhere
                assert torch.equal(everywhere, numbers(root, numel, torch.float32)), (group.size, root, numel)

                mine = given.clone()
                assert commlab.reduce(mine, root, "mean", algorithm=algorithm, group=group) is mine
                want = expected("mean", group.size, numel, torch.float32) if group.rank == root else given
                assert torch.equal(mine, want), (group.size, root, numel)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_push_of_16_bits_arrives_in_fp32(ranks: Ranks, dtype: torch.dtype) -> None:
    """``direct`` leaves the owner's sums in fp32: nothing is rounded after the packing."""
    for group in all_groups(ranks):
        chunks = split(103, group.size)
        own = chunks[group.rank]
        everyone = [numbers(rank, 103, dtype) for rank in range(group.size)]
        part = reduce_chunks_async(everyone[group.rank].clone(), chunks, "mean", algorithm="direct", group=group).wait()
        assert part.dtype == (torch.float32 if group.size > 1 else dtype)
        want = torch.stack(everyone).float().sum(0) / group.size
        assert torch.equal(part.float(), want[own.start : own.stop])


def test_handles_may_be_waited_for_in_any_order(ranks: Ranks) -> None:
    for group in all_groups(ranks):
        order = [3, 0, 4, 1, 2] if group.rank % 2 else [4, 2, 3, 0, 1]
        numels = [1000, 1, LARGE, 0, 64]
        names = list(ALGORITHMS)
        handles = [
            commlab.allreduce_async(
                numbers(group.rank, numel, torch.float64), "sum", f"t{at}", names[at % 4], group=group
            )
            for at, numel in enumerate(numels)
        ]
        for at in order:
            assert torch.equal(handles[at].wait(), expected("sum", group.size, numels[at], torch.float64)), at
        assert all(handle.done() for handle in handles)
        assert torch.equal(handles[0].wait(), handles[0].result), "waiting again is harmless"


def test_two_groups_that_share_ranks(ranks: Ranks) -> None:
    """All ranks, and every second one in reverse order, with operations of both under way at once."""
    some = ranks.group(*range(0, ranks.size, 2)[::-1])
    for numel in (5, LARGE):
        wide = [commlab.allreduce_async(numbers(ranks.rank, numel, torch.float32), "sum") for _ in range(2)]
        if some is not None:
            assert some.nodes == (tuple(range(some.size)),)
            narrow = [
                commlab.allreduce_async(numbers(some.rank, numel, torch.int64), "sum", algorithm=name, group=some)
                for name in ("ring", "tree")
            ]
            for handle in narrow[::-1]:
                assert torch.equal(handle.wait(), expected("sum", some.size, numel, torch.int64))
        for handle in wide:
            assert torch.equal(handle.wait(), expected("sum", ranks.size, numel, torch.float32))


def test_a_progress_thread_gives_the_same_results(ranks: Ranks) -> None:
    """Where every rank has a node, and so a core, to itself, a thread moves operations on."""
    from commlab.transport.mpi import MpiTransport

    transport = MpiTransport()
    if not transport.threads:
        pytest.skip("this MPI allows one thread only")
    group = Group(transport, Topology(tuple((rank,) for rank in range(ranks.size))), timeout_s=60.0)
    try:
        assert group.progress.threaded or len(group.nodes) == 1
        for at in range(6):
            names = list(ALGORITHMS)
            handles = [
                commlab.allreduce_async(
                    numbers(group.rank, numel, torch.float32), "sum", algorithm=names[(at + n) % 4], group=group
                )
                for n, numel in enumerate((1, 1000, 0, 20_000, 5))
            ]
            if at % 2:
                handles[2].wait()
                torch.randn(50, 50).mm(torch.randn(50, 50))
                group.progress.poll()
            for handle, numel in zip(handles, (1, 1000, 0, 20_000, 5), strict=True):
                assert torch.equal(handle.wait(), expected("sum", group.size, numel, torch.float32))
    finally:
        group.close()


def test_counters_and_records(ranks: Ranks) -> None:
    group = ranks.world
    before = group.bytes_sent
    commlab.allreduce(torch.ones(8 * 100), algorithm="ring")
    if group.size == 8:
        assert group.bytes_sent - before == 4 * 2 * 7 * 100
    texts = gather_bytes(group, b"\0" * group.rank + bytes([65 + group.rank]), "texts")
    assert texts == [b"\0" * rank + bytes([65 + rank]) for rank in range(group.size)]
    assert gather_bytes(group, b"", "nothing") == [b""] * group.size
    assert exchange_records(group, bytes([group.rank] * 3), "three") == [
        bytes([rank] * 3) for rank in range(group.size)
    ]
    assert sorted(rank for node in group.nodes for rank in node) == list(range(group.size))
    assert commlab.init() is group
