"""Horovod's operations, matched by name: closed forms for every dtype, layout and reduction; orders that differ between
ranks; process sets, join, gradients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from refused import message

import commlab.horovod.torch as hvd

DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8", "int8", "int16"),
    *("complex64", "complex128"),
)
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (5,), (3, 4), (2, 3, 7), (9001,), (300_001,))


def numbers(rank: int, shape: tuple[int, ...], dtype: str = "float32") -> torch.Tensor:
    """Distinct for each rank and index, and so small that sums and products of a few ranks are exact in every dtype."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7 + 3 * rank) % 4 + 1 + rank % 2).to(getattr(torch, dtype)).view(shape)


def reductions(rank: int, size: int) -> int:
    hvd.init()
    count = 0
    for dtype in DTYPES:
        for shape in SHAPES:
            every = [numbers(peer, shape, dtype) for peer in range(size)]
            handles = [hvd.allreduce_async(every[rank], name=f"sum {dtype} {shape}", op=hvd.Sum)]
            expected = [torch.stack(every).sum(0).to(every[0].dtype)]
            if not every[0].is_complex():
                handles += [
                    hvd.allreduce_async(every[rank], op=op, name=f"{op} {dtype} {shape}") for op in (hvd.Min, hvd.Max)
                ]
                handles.append(hvd.allreduce_async_(every[rank].clone(), op=hvd.Product))
                expected += [torch.stack(every).amin(0), torch.stack(every).amax(0)]
                expected.append(torch.stack(every).prod(0).to(every[0].dtype))
            if every[0].is_floating_point():
                handles.append(hvd.allreduce_async(every[rank].float(), name=f"mean {dtype} {shape}"))
                expected.append(torch.stack(every).float().sum(0) / size)
            for handle, want in zip(handles, expected, strict=True):
                found = hvd.synchronize(handle)
                assert found.dtype is want.dtype and found.shape == want.shape
                torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
                count += 1
    truth = torch.tensor([rank == 0, True, False])
    assert hvd.allreduce(truth, op=hvd.Sum).tolist() == [True, True, False]
    assert hvd.allreduce(truth, op=hvd.Product).tolist() == [False, True, False]
    assert hvd.allreduce(torch.tensor([7, -7]) * (rank + 1)).tolist() == [10, -10]  # of 21 and -21, cut
    # Layouts, in place: numbers that do not lie one behind the other.
    for tensor in (numbers(rank, (4, 6)).t(), numbers(rank, (4, 6))[:, ::2], numbers(rank, (5, 4)).unfold(0, 2, 2)):
        gathered = hvd.allgather(tensor.contiguous()[None])
        assert torch.equal(hvd.allreduce_(tensor, op=hvd.Sum), gathered.sum(0)) and torch.equal(tensor, gathered.sum(0))
    # One rounding: 16-bit numbers are added in fp32.
    big = torch.full((1000,), 2048.0 if rank == 0 else 1.0, dtype=torch.float16)
    assert hvd.allreduce(big, op=hvd.Average)[0] == torch.tensor(2049 / 2).half()
    scaled = hvd.allreduce(numbers(rank, (9,)), op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0)
    torch.testing.assert_close(scaled, sum(numbers(peer, (9,)) for peer in range(size)) * 2.0)
    hvd.shutdown()
    return count


def test_reductions(forked: Callable[..., list[Any]]) -> None:
    """Known defects of the original: bf16, bool, int16, complex; tensors that are not contiguous."""
    assert min(forked(reductions)) > 200


def scaled_halves(rank: int, size: int) -> bool:
    hvd.init()
    numbers = (torch.arange(4913.0) * 37 % 199 - 99).half()
    for factor in (0.1389, 0.9296, 1 / 3):
        exact = numbers.double() * float(torch.tensor(factor)) * size
        summed = hvd.allreduce(numbers, op=hvd.Sum, prescale_factor=factor)
        shared = hvd.reducescatter(numbers[: size * 100], op=hvd.Sum, prescale_factor=factor)
        assert torch.equal(summed, exact.half()) and torch.equal(shared, exact.half()[rank * 100 : rank * 100 + 100])
    hvd.shutdown()
    return True


def test_scaled_halves_are_rounded_once(forked: Callable[..., list[Any]]) -> None:
    """Of every exact sum the nearest fp16 number. To round what is scaled before it is added three times, as Horovod
    does, gives another number for a fifth of these."""
    assert all(forked(scaled_halves, 3))


def orders(rank: int, size: int) -> int:
    hvd.init()
    names = [f"t{index}" for index in range(40)]
    order = names if rank == 0 else names[::-1]
    handles = {name: hvd.allreduce_async(numbers(rank, (int(name[1:]) + 1,)), name=name, op=hvd.Sum) for name in order}
    results: dict[str, Any] = {}

    def from_thread(which: int) -> None:
        # Each thread's operations, in another order on each rank.
        for turn in range(10):
            name = f"thread {which} {(turn if rank else 9 - turn)}"
            handles[name] = hvd.allgather_async(torch.tensor([rank * 100.0 + which]), name=name)
        for turn in range(10):
            name = f"thread {which} {turn}"
            results[name] = hvd.synchronize(handles[name]).tolist()

    threads = [threading.Thread(target=from_thread, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for name in names:
        every = [numbers(peer, (int(name[1:]) + 1,)) for peer in range(size)]
        assert torch.equal(hvd.synchronize(handles[name]), torch.stack(every).sum(0)), name
    for thread in threads:
        thread.join()
    for name, found in results.items():
        assert found == [peer * 100.0 + int(name.split()[1]) for peer in range(size)]
    # Progress without the caller: nobody calls anything here.
    handle = hvd.allreduce_async(torch.ones(3), name="alone")
    stop_s = time.monotonic() + 20
    while not hvd.poll(handle) and time.monotonic() < stop_s:
        time.sleep(0.01)
    assert hvd.poll(handle)
    # The same requests again, which are announced by number; and another shape under a name.
    for turn in range(3):
        assert hvd.allreduce(torch.ones(2 + turn % 2), name="again", op=hvd.Sum).sum() == size * (2 + turn % 2)
    hvd.shutdown()
    return len(results)


def test_order_and_threads(forked: Callable[..., list[Any]]) -> None:
    """Operations are matched by name, from any thread, in any order on different ranks."""
    assert forked(orders, 3) == [30] * 3


def moves(rank: int, size: int) -> bool:
    hvd.init()
    for dtype in (*DTYPES, "bool"):
        kind = getattr(torch, dtype)
        own = numbers(rank, (rank + 1, 3)).to(kind)
        every = torch.cat([numbers(peer, (peer + 1, 3)).to(kind) for peer in range(size)])
        assert torch.equal(hvd.allgather(own), every)
        assert torch.equal(hvd.broadcast(numbers(rank, (2, 5)).to(kind), size - 1), numbers(size - 1, (2, 5)).to(kind))
    assert torch.equal(hvd.allgather(torch.tensor(float(rank))), torch.arange(float(size)))
    assert hvd.allgather(torch.empty(0, 2) if rank else torch.ones(2, 2)).shape == (2, 2)
    large = hvd.broadcast_(numbers(rank, (400_000,)), 0)
    assert torch.equal(large, numbers(0, (400_000,)))
    assert torch.equal(
        hvd.allgather(numbers(rank, (40_000, 3))), torch.cat([numbers(p, (40_000, 3)) for p in range(size)])
    )
    first, second = hvd.grouped_allgather([torch.full((rank,), 1.0), torch.full((2, 2), rank)])
    assert first.shape == (sum(range(size)),) and second.shape == (2 * size, 2)
    # Rank r sends to + 1 rows to each rank, and keeps a row that nobody gets.
    splits = torch.arange(1, size + 1, dtype=torch.int32)
    rows = int(splits.sum()) + 1
    found, received = hvd.alltoall(torch.full((rows, 2), float(rank)), splits)
    assert received.tolist() == [rank + 1] * size and received.dtype is torch.int32
    assert found[:, 0].tolist() == [float(peer) for peer in range(size) for _ in range(rank + 1)]
    assert hvd.alltoall(torch.arange(float(size)) + 10 * rank).tolist() == [10.0 * peer + rank for peer in range(size)]
    for count in (1, 2 * size + 1, 4 * size):
        whole = sum(numbers(peer, (count, 3)) for peer in range(size))
        mine = [count // size + (peer < count % size) for peer in range(size)]
        piece = hvd.reducescatter(numbers(rank, (count, 3)), op=hvd.Sum)
        assert torch.equal(piece, whole.split(mine)[rank])
    halves = hvd.grouped_reducescatter([numbers(rank, (4, 2), "bfloat16"), numbers(rank, (size,), "int64")], op=hvd.Sum)
    assert halves[0].dtype is torch.bfloat16 and halves[1].shape == (1,)
    assert hvd.broadcast_object({"rank": rank, "t": torch.ones(3) * rank}, 1)["t"].tolist() == [1.0] * 3
    assert hvd.allgather_object(["x"] * rank) == [["x"] * peer for peer in range(size)]
    pair = hvd.grouped_allreduce([torch.ones(2), torch.ones(3, dtype=torch.int32)], op=hvd.Sum)
    assert [each.tolist() for each in pair] == [[size] * 2, [size] * 3]
    sparse = torch.sparse_coo_tensor([[rank, 2]], torch.tensor([1.0, 2.0]), (5,))
    assert hvd.sparse_allreduce_async(sparse, "sparse", hvd.Sum)().to_dense()[2] == 2.0 * size + (size > 2)
    hvd.shutdown()
    return True


@pytest.mark.parametrize(("size", "nodes"), [(2, "2"), (3, "2")])
def test_moves(forked: Callable[..., list[Any]], size: int, nodes: str) -> None:
    """In a window, and on two nodes by messages."""
    assert all(forked(moves, size, environ={"COMMLAB_NODES": nodes}))


def elsewhere(rank: int, size: int) -> bool:
    hvd.init()
    whole = [numbers(peer, (5 + peer, 3)) for peer in range(size)]
    mine = whole[rank]
    bag = torch.nn.EmbeddingBag(7, 3, sparse=True, mode="sum")
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(bag.parameters(), lr=1.0), bag.named_parameters())
    at, start = torch.tensor([rank, 3]), torch.tensor([0])
    before = bag.weight.detach().clone()
    torch.set_default_device("meta")
    try:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            got = hvd.allreduce(whole[0].to(dtype).t() * (1 + rank), op=hvd.Sum)
            assert torch.equal(got.t(), whole[0].to(dtype) * (size * (size + 1) // 2))
            assert torch.equal(hvd.allgather(mine.to(dtype)), torch.cat(whole).to(dtype))
            assert torch.equal(
                hvd.allreduce(mine[:3].to(dtype), op=hvd.Adasum).isfinite().sum(), mine.new_tensor(9).long()
            )
        got, counts = hvd.alltoall(mine[:size], [1] * size)
        assert torch.equal(got, torch.stack([each[rank] for each in whole])) and counts.tolist() == [1] * size
        assert torch.equal(hvd.broadcast_object({"w": mine}, size - 1)["w"], whole[-1])
        assert all(map(torch.equal, hvd.allgather_object(mine), whole))
        bag(at, start).sum().backward()
        optimizer.step()
    finally:
        torch.set_default_device(None)
    hits = torch.zeros(7)
    for peer in range(size):
        hits[peer] += 1 / size
    hits[3] += 1
    assert torch.allclose(bag.weight.detach(), before - hits[:, None], atol=1e-6)
    return True


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_a_default_device_is_the_programs(forked: Callable[..., list[Any]], nodes: str) -> None:
    assert all(forked(elsewhere, 2, environ={"COMMLAB_NODES": nodes}))


def adasums(rank: int, size: int) -> bool:
    hvd.init()

    def pair(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        dot = a.dot(b)
        return (1 - dot / (2 * a.dot(a))) * a + (1 - dot / (2 * b.dot(b))) * b

    every = [
        torch.randn(37, generator=torch.Generator().manual_seed(peer), dtype=torch.float64) for peer in range(size)
    ]
    power = 1 << (size.bit_length() - 1)
    held = [pair(every[at], every[at + power]) if at + power < size else every[at] for at in range(power)]
    while len(held) > 1:
        held = [pair(held[at], held[at + 1]) for at in range(0, len(held), 2)]
    found = hvd.allreduce(every[rank], op=hvd.Adasum)
    torch.testing.assert_close(found, held[0], rtol=1e-12, atol=1e-12)
    # What is equal on all ranks counts once; what has nothing in common is added.
    torch.testing.assert_close(hvd.allreduce(torch.ones(5), op=hvd.Adasum), torch.ones(5))
    axis = torch.zeros(size).index_fill(0, torch.tensor(rank), 1.0)
    torch.testing.assert_close(hvd.allreduce(axis, op=hvd.Adasum), torch.ones(size))
    hvd.shutdown()
    return True


@pytest.mark.parametrize("size", [3, 4])
def test_adasum(forked: Callable[..., list[Any]], size: int) -> None:
    assert all(forked(adasums, size))


def sets(rank: int, size: int) -> list[Any]:
    hvd.init(process_sets=[hvd.ProcessSet([0, 1])])
    odd, even = hvd.add_process_set([1]), hvd.add_process_set(hvd.ProcessSet([0, 2]))
    own = odd if rank == 1 else even
    assert even.included() == (rank != 1) and own.size() == (1 if rank == 1 else 2)
    # Sets are used in any order; the set of all ranks in between.
    everyone = hvd.allreduce_async(torch.ones(2), name="everyone", op=hvd.Sum)
    found = hvd.allreduce(torch.full((2,), float(rank + 1)), op=hvd.Sum, process_set=own).tolist()
    assert hvd.synchronize(everyone).tolist() == [3.0, 3.0]
    gathered = hvd.allgather(torch.tensor([rank]), process_set=own).tolist()
    hvd.barrier(own)
    told = hvd.broadcast_object(f"from {rank}", 0 if rank != 1 else 1, process_set=own)
    foreign = message(lambda: hvd.allreduce(torch.ones(1), process_set=even if rank == 1 else odd))
    assert f"rank {rank}" in foreign and "not in" in foreign
    assert hvd.remove_process_set(odd) and hvd.remove_process_set(even) and not hvd.remove_process_set(even)
    assert even.process_set_id is None and "not registered" in message(lambda: hvd.barrier(even))
    hvd.shutdown()
    return [found, gathered, told]


def test_process_sets(forked: Callable[..., list[Any]]) -> None:
    assert forked(sets, 3) == [
        [[4.0, 4.0], [0, 2], "from 0"],
        [[2.0, 2.0], [1], "from 1"],
        [[4.0, 4.0], [0, 2], "from 0"],
    ]


def joins(rank: int, size: int) -> list[Any]:
    hvd.init()
    found = [hvd.allreduce(torch.ones(2)).tolist() for _ in range(rank + 1)]
    refused = message(lambda: hvd.allgather(torch.ones(1))) if rank == size - 1 else ""
    last = hvd.join()
    # Ranks have named one, two and three operations of their own; afterwards they match again.
    after = [hvd.allreduce(torch.full((1,), float(rank)), op=hvd.Sum).item() for _ in range(2)]
    after.append(hvd.allgather(torch.tensor([rank])).tolist())
    again = hvd.join()
    hvd.shutdown()
    return [found, refused, last, after, 0 <= again < size]


def test_join(forked: Callable[..., list[Any]]) -> None:
    """Known defect of the original: three ranks and more after join()."""
    results = forked(joins, 3)
    for rank, (found, _, last, after, again) in enumerate(results):
        assert [each[0] for each in found] == pytest.approx([1.0, 2 / 3, 1 / 3][: rank + 1])
        assert last == 2 and after == [3.0, 3.0, [0, 1, 2]] and again
    assert "ranks 0, 1 called join()" in results[2][1]


def gradients(rank: int, size: int) -> bool:
    hvd.init()

    def leaf(*shape: int) -> torch.Tensor:
        return torch.ones(shape, requires_grad=True)

    reduced = leaf(3)
    hvd.allreduce(reduced, op=hvd.Sum).backward(torch.full((3,), rank + 1.0))
    assert reduced.grad is not None and reduced.grad.tolist() == [3.0] * 3
    gathered = leaf(rank + 1, 2)
    hvd.allgather(gathered).backward(torch.arange(3.0)[:, None].expand(3, 2) * (rank + 1))
    rows = [[0.0], [1.5, 3.0]][rank]
    assert gathered.grad is not None and gathered.grad[:, 0].tolist() == rows
    sent = leaf(2)
    hvd.broadcast(sent, 1).backward(torch.full((2,), 2.0 * rank))
    assert sent.grad is not None and sent.grad.tolist() == [0.0 if rank == 0 else 1.0] * 2
    swapped = leaf(4)
    hvd.alltoall(swapped, [1, 2])[0].backward(torch.full((2 * (rank + 1),), 1.0 + rank))
    assert swapped.grad is not None and swapped.grad.tolist() == [1.0, 2.0, 2.0, 0.0]
    scattered = leaf(4)
    hvd.reducescatter(scattered, op=hvd.Sum).backward(torch.full((2,), 1.0 + rank))
    assert scattered.grad is not None and scattered.grad.tolist() == [2.0, 2.0, 4.0, 4.0]
    several = [leaf(2), leaf(3)]
    torch.cat(hvd.grouped_allreduce(several, op=hvd.Average)).sum().backward()
    assert [each.grad.sum().item() for each in several if each.grad is not None] == [2.0, 3.0]
    half = leaf(3)
    hvd.allreduce(half, compression=hvd.Compression.bf16).sum().backward()
    assert half.grad is not None and half.grad.dtype is torch.float32
    hvd.shutdown()
    return True


def test_gradients(forked: Callable[..., list[Any]]) -> None:
    assert all(forked(gradients))
