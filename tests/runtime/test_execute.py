"""The executor: any cut into chunks, any order of events, and how it rounds."""

from __future__ import annotations

import pytest
import torch
from closed_form import (
    HALVES,
    LARGEST_16_BIT,
    UNIT_ROUNDOFF,
    expected,
    hop_tolerance,
    numbers,
    ops_for,
    reference,
    same_bits,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated import AdverseNetwork, simulate

from commlab import native
from commlab.chunks import EMPTY, Range, whole_at
from commlab.runtime.execute import IN_FLIGHT, Execution
from commlab.runtime.operand import Operand, byte_view
from commlab.schedules import ALGORITHMS, compose
from commlab.schedules.step import Finish, Relay, Schedule, Step, with_relays
from commlab.transport.sim import SimNetwork

algorithms = pytest.mark.parametrize("name", ALGORITHMS)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Range, ...]:
    """Chunks of 1..9 ranks, of any size, many of them empty."""
    sizes = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 7, 20, 61]), min_size=1, max_size=9))
    stops = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    return tuple(Range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True))


@algorithms
@given(chunks=cuts(), segment_numel=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=60)
@example(chunks=(EMPTY,) * 4, segment_numel=3, seed=0)
@example(chunks=(EMPTY, Range(0, 61), Range(61, 61)), segment_numel=4, seed=1)
def test_any_cut_on_an_adverse_network(name: str, chunks: tuple[Range, ...], segment_numel: int, seed: int) -> None:
    """Reduce-scatter, then allgather, with messages late, early and out of order: the mean everywhere, exactly."""
    algorithm, size, numel = ALGORITHMS[name], len(chunks), chunks[-1].stop
    total = expected("mean", size, numel, torch.float32)

    def both(rank: int) -> Schedule:
        yield from compose.reduce_scatter(algorithm, rank, chunks)
        yield from algorithm.allgather(rank, chunks)

    data = [numbers(rank, numel, torch.float32) for rank in range(size)]
    simulate(both, [Operand(each, "sum", size) for each in data], 4 * segment_numel, AdverseNetwork(size, seed))
    assert all(torch.equal(got, total) for got in data)

    data = [numbers(rank, numel, torch.float32) for rank in range(size)]
    operands = [Operand(each, "sum", size) for each in data]
    simulate(
        lambda rank: compose.reduce_scatter(algorithm, rank, chunks),
        operands,
        4 * segment_numel,
        AdverseNetwork(size, seed),
    )
    assert torch.equal(torch.cat([got[own.start : own.stop] for got, own in zip(data, chunks, strict=True)]), total)


@algorithms
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_every_order_of_events_gives_the_same_bits(name: str, size: int) -> None:
    """Sums that round, on twelve random networks and the plain one: the same bits on all ranks, every time."""
    generator = torch.Generator().manual_seed(size)
    data = [torch.randn(333, generator=generator) * 10 ** (rank % 4) for rank in range(size)]
    results = []
    for network in (SimNetwork(size), *(AdverseNetwork(size, seed) for seed in range(12))):
        copies = [each.clone() for each in data]
        simulate(lambda rank: compose.allreduce(ALGORITHMS[name], rank, size, 333), copies, 4 * 37, network)
        results += copies
    assert all(same_bits(results[0], other) for other in results)
    # Each of the P - 1 additions and the reference round by at most u times the sum of the absolute values.
    bound = size * UNIT_ROUNDOFF[torch.float32] * torch.stack(data).abs().sum(0)
    assert ((results[0] - reference(data, "sum")).abs() <= bound).all()


def operands_16_bit(name: str, data: list[torch.Tensor], op: str) -> list[Operand]:
    """As the operations make them: ``direct`` sums in fp32 at the owner, the others divide a mean first."""
    size, numel = len(data), data[0].numel()
    if name == "direct":
        owners = ALGORITHMS[name].owners(numel, size)
        return [
            Operand(each, "sum" if op == "mean" else op, size if op == "mean" else 1, owners[rank])
            for rank, each in enumerate(data)
        ]
    for each in data:
        native.divide(each, 0, numel, size if op == "mean" else 1)
    return [Operand(each, "sum" if op == "mean" else op) for each in data]


@algorithms
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 17])
def test_16_bit(name: str, dtype: torch.dtype, size: int) -> None:
    for op in ops_for(dtype):
        data = [numbers(rank, 101, dtype, op) for rank in range(size)]
        simulate(lambda rank: compose.allreduce(ALGORITHMS[name], rank, size, 101), operands_16_bit(name, data, op), 26)
        tolerance = hop_tolerance(size, dtype) if op == "mean" and name != "direct" else 0
        for got in data:
            assert same_bits(got, data[0])
            assert ((got.double() - expected(op, size, 101, dtype).double()).abs() <= tolerance).all(), op


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("size", [2, 3, 7, 16, 17])
def test_direct_rounds_once(dtype: torch.dtype, op: str, size: int) -> None:
    """Equal to the float64 result rounded once, where hop-by-hop rounding would not be.

    The contributions are multiples of 2^-10 below 32 (2^-3 for bf16), so their sum has at most 20 bits and fp32 holds
    it; a quotient by P <= 17 is then at least 2^-20 (relative) away from any tie that it is not, so that dividing in
    fp32 first makes no difference.
    """
    generator = torch.Generator().manual_seed(size)
    raw = torch.randint(-(2**15), 2**15, (size, 2000), generator=generator).double() / 1024
    data = [each.to(dtype) for each in raw]
    want = reference(data, op)
    hop_by_hop = data[0].clone()
    for each in data[1:]:
        hop_by_hop += each
    assert size == 2 or op == "mean" or not torch.equal(hop_by_hop, want), "this data would not show the difference"
    simulate(
        lambda rank: compose.allreduce(ALGORITHMS["direct"], rank, size, 2000), operands_16_bit("direct", data, op)
    )
    assert all(torch.equal(got, want) for got in data)


@algorithms
@pytest.mark.parametrize("size", [2, 3, 7, 8, 17])
def test_mean_of_large_fp16_does_not_overflow(name: str, size: int) -> None:
    """60000 from everyone: the sum is beyond fp16. Exact with ``direct``, and where all sums are doublings."""
    data = [torch.full((50,), 60000.0, dtype=torch.float16) for _ in range(size)]
    simulate(lambda rank: compose.allreduce(ALGORITHMS[name], rank, size, 50), operands_16_bit(name, data, "mean"))
    exact = name == "direct" or (name != "ring" and size & (size - 1) == 0)
    tolerance = 0 if exact else hop_tolerance(size, torch.float16, 60000)
    for got in data:
        assert ((got.double() - 60000).abs() <= tolerance).all(), got[0]


def test_wide_results_are_not_rounded() -> None:
    """With ``wide``, the owner's fp32 sums stay fp32, divided."""
    size, numel = 3, 40
    data = [numbers(rank, numel, torch.bfloat16) + LARGEST_16_BIT for rank in range(size)]
    owners = ALGORITHMS["direct"].owners(numel, size)
    wides = [torch.full((own.numel,), torch.nan) for own in owners]
    operands = [Operand(data[rank], "sum", size, owners[rank], wides[rank]) for rank in range(size)]
    simulate(lambda rank: compose.reduce_scatter(ALGORITHMS["direct"], rank, owners), operands, 10)
    want = torch.stack(data).float().sum(0) / size
    assert torch.equal(torch.cat(wides), want)
    assert not torch.equal(want.bfloat16().float(), want), "nothing here needs more than 16 bits"


def finish_elsewhere(rank: int) -> Schedule:
    """Rank 0 halves a chunk cut elsewhere than the receives before and the send after it, and then what it has sent."""
    received, chunk = Range(0, 14), Range(3, 14)
    if rank == 0:
        yield Step(None, EMPTY, 1, received, reduce=True)
        yield Finish(chunk)
        yield Step(1, received, None, EMPTY)
        yield Finish(Range(0, 3))
    else:
        yield Step(0, received, None, EMPTY)
        yield Step(None, EMPTY, 0, received)


@pytest.mark.parametrize("seed", range(20))
def test_finish_may_be_cut_in_other_places(seed: int) -> None:
    data = [numbers(rank, 14, torch.float32) for rank in range(2)]
    total, halved = expected("sum", 2, 14, torch.float32), expected("mean", 2, 14, torch.float32)
    simulate(finish_elsewhere, [Operand(each, "sum", 2) for each in data], 4 * 7, AdverseNetwork(2, seed))
    assert torch.equal(data[0], halved)
    assert torch.equal(data[1], torch.cat([total[:3], halved[3:]]))


@pytest.mark.parametrize("reduce", [True, False], ids=["reduce", "broadcast"])
def test_a_chain_sends_on_what_has_arrived(reduce: bool) -> None:
    """The middle rank has sent its first segments before the last ones were even sent to it."""
    network, numel = SimNetwork(3), 80
    left, middle, right = network.transports()
    chunks = whole_at(2 if reduce else 0, numel, 3)
    half = compose.reduce_scatter if reduce else compose.allgather
    given_ = numbers(0, numel, torch.float32)
    mine = numbers(1, numel, torch.float32)
    want = given_ + mine if reduce else given_
    execution = Execution(half(ALGORITHMS["ring"], 1, chunks), Operand(mine), middle, segment_bytes=4 * 10)
    going = execution.run()
    got = torch.empty(numel)
    for at in range(0, numel, 10):
        right.irecv(byte_view(got[at : at + 10]), 1)
        left.isend(byte_view(given_[at : at + 10]), 1)
        waits = next(going, None)
        arrived = sum(frm == 1 for frm, _, _ in network.messages)
        # It looks for a message when the receives in flight are as many as it may have.
        assert arrived >= at // 10 - IN_FLIGHT + 1
    assert waits is None and torch.equal(got, want)


def test_only_a_step_in_and_a_step_out_of_one_chunk_make_a_relay() -> None:
    chunk, other = Range(0, 4), Range(4, 8)
    receive, send = Step(None, EMPTY, 0, chunk, True), Step(2, chunk, None, EMPTY)
    assert list(with_relays([receive, send])) == [Relay(chunk, 0, 2, True)]
    for schedule in (
        [receive, Step(2, other, None, EMPTY)],
        [receive, Finish(chunk), send],
        [send, receive],
        [Step(2, other, 0, chunk, True), send],
    ):
        assert list(with_relays(schedule)) == schedule
    assert list(with_relays([receive, receive, send, send])) == [receive, Relay(chunk, 0, 2, True), send]
