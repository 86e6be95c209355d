"""Every collective of torch.distributed on commlab's backend, against closed forms: each dtype, odd sizes, layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import Forked
from torch import nn

from commlab.errors import DisagreementError

REDUCED = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8", "int8", "int16")
MOVED = (*REDUCED, "bool", "complex64", "complex128")
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (5,), (3, 4), (2, 3, 7), (9001,), (70001,))


def numbers(rank: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Distinct for each rank and index, and so small that sums and products of a few ranks are exact in every dtype."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7 + 3 * rank) % 4 + 1 + rank % 2).to(getattr(torch, dtype)).view(shape)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers, lying otherwise in memory."""
    if layout == "transposed" and tensor.dim() == 2:
        return tensor.t().contiguous().t()
    if layout == "strided" and tensor.dim():
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "offset" and tensor.dim():
        return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)
    return tensor.clone()


LAYOUTS = ("plain", "transposed", "strided", "offset")


def reductions(rank: int, size: int) -> int:
    checked = 0
    for dtype in REDUCED:
        for shape in SHAPES:
            parts = [numbers(peer, shape, dtype).double() for peer in range(size)]
            total = torch.stack(parts).sum(0)
            mean = total / size if getattr(torch, dtype).is_floating_point else (total / size).trunc()
            wanted = {
                dist.ReduceOp.SUM: total,
                dist.ReduceOp.MAX: torch.stack(parts).amax(0),
                dist.ReduceOp.MIN: torch.stack(parts).amin(0),
                dist.ReduceOp.PRODUCT: torch.stack(parts).prod(0),
                dist.ReduceOp.AVG: mean,
            }
            for op, answer in wanted.items():
                rounded = answer.to(getattr(torch, dtype))
                # Two ranks may keep the tensor in different layouts.
                own = laid_out(numbers(rank, shape, dtype), LAYOUTS[(rank + checked) % 4])
                dist.all_reduce(own, op)
                assert torch.equal(own, rounded), (dtype, shape, op)
                root = checked % size
                own = laid_out(numbers(rank, shape, dtype), LAYOUTS[checked % 4])
                dist.reduce(own, root, op)
                if rank == root:
                    assert torch.equal(own, rounded), (dtype, shape, op)
                checked += 1
    return checked


@pytest.mark.parametrize("size", [2, 3])
def test_reductions(forked: Forked, size: int) -> None:
    assert forked(reductions, size) == [len(REDUCED) * len(SHAPES) * 5] * size


def part_of(rank: int, index: int, numel: int, dtype: str) -> torch.Tensor:
    """What rank has for its peer number ``index``."""
    return numbers(rank + 5 * index, (numel,), dtype)


def reduce_scatters(rank: int, size: int) -> None:
    for dtype in REDUCED:
        for numel in (1, 5, 4099):
            whole = torch.cat([part_of(rank, index, numel, dtype) for index in range(size)])
            wanted = sum(part_of(peer, rank, numel, dtype).double() for peer in range(size))
            assert isinstance(wanted, torch.Tensor)
            before = whole.clone()
            out = torch.empty(numel, dtype=whole.dtype)
            dist.reduce_scatter_tensor(out, whole)
            assert torch.equal(out.double(), wanted), (dtype, numel)
            assert torch.equal(whole, before)
            dist.reduce_scatter(out.zero_(), list(whole.split(numel)))
            assert torch.equal(out.double(), wanted), (dtype, numel)
            # The input may contain the output.
            dist.reduce_scatter_tensor(whole.view(size, -1)[rank], whole)
            assert torch.equal(whole.view(size, -1)[rank].double(), wanted), (dtype, numel)
    # Parts of different sizes.
    sizes = [3 * index + 1 for index in range(size)]
    parts = [part_of(rank, index, numel, "float32") for index, numel in enumerate(sizes)]
    out = torch.empty(sizes[rank])
    dist.reduce_scatter(out, parts)
    assert torch.equal(out, sum(part_of(peer, rank, sizes[rank], "float32") for peer in range(size)))


def gathers(rank: int, size: int) -> None:
    for dtype in MOVED:
        for numel in (0, 1, 5, 4099, 20011):
            own = numbers(rank, (numel,), dtype)
            wanted = [numbers(peer, (numel,), dtype) for peer in range(size)]
            outs = [torch.empty_like(own) for _ in range(size)]
            dist.all_gather(outs, own)
            assert all(map(torch.equal, outs, wanted)), (dtype, numel)
            out = torch.empty(size * numel, dtype=own.dtype)
            dist.all_gather_into_tensor(out, own)
            assert torch.equal(out, torch.cat(wanted)), (dtype, numel)
            if own.is_complex():
                continue
            for root in {0, size - 1}:
                outs = [torch.empty_like(own) for _ in range(size)] if rank == root else []
                dist.gather(own, outs or None, root)
                assert all(map(torch.equal, outs, wanted if rank == root else [])), (dtype, numel)
                parts = [part_of(root, index, numel, dtype) for index in range(size)] if rank == root else None
                dist.scatter(got := torch.empty_like(own), parts, root)
                assert torch.equal(got, part_of(root, rank, numel, dtype)), (dtype, numel)
                for layout in LAYOUTS:
                    sent = laid_out(own, layout)
                    dist.broadcast(sent, root)
                    assert torch.equal(sent, wanted[root]), (dtype, numel, layout)
    # Parts of different sizes, into tensors that are not contiguous.
    outs = [torch.zeros(2, 2 * peer + 1).t() for peer in range(size)]
    dist.all_gather(outs, numbers(rank, (2 * rank + 1, 2), "float32"))
    assert all(torch.equal(out, numbers(peer, (2 * peer + 1, 2), "float32")) for peer, out in enumerate(outs))


def alltoalls(rank: int, size: int) -> None:
    for dtype in MOVED[:-2]:
        for numel in (1, 5, 4099, 300_001):
            parts = [part_of(rank, index, numel, dtype) for index in range(size)]
            wanted = [part_of(peer, rank, numel, dtype) for peer in range(size)]
            outs = [torch.empty(numel, dtype=parts[0].dtype) for _ in range(size)]
            dist.all_to_all(outs, parts)
            assert all(map(torch.equal, outs, wanted)), (dtype, numel)
            out = torch.empty(size * numel, dtype=parts[0].dtype)
            dist.all_to_all_single(out, torch.cat(parts))
            assert torch.equal(out, torch.cat(wanted)), (dtype, numel)
    # Rank r sends r + 2 index rows of three to rank index.
    counts = [rank + 2 * index for index in range(size)]
    back = [peer + 2 * rank for peer in range(size)]
    parts = [part_of(rank, index, 3 * count, "int32").view(-1, 3) for index, count in enumerate(counts)]
    out = torch.empty(sum(back), 3, dtype=torch.int32)
    dist.all_to_all_single(out, torch.cat(parts), back, counts)
    assert torch.equal(out, torch.cat([part_of(peer, rank, 3 * n, "int32").view(-1, 3) for peer, n in enumerate(back)]))


def coalesced(rank: int, size: int) -> None:
    shapes = ((3,), (2, 5), (), (7001,))
    tensors = [numbers(rank, shape, "float32") for shape in shapes]
    dist.all_reduce_coalesced(tensors)
    for tensor, shape in zip(tensors, shapes, strict=True):
        assert torch.equal(tensor, sum(numbers(peer, shape, "float32") for peer in range(size)))
    with dist._coalescing_manager(async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
    manager.wait()
    outs = [torch.empty(size * n) for n in (3, 5000)]
    with dist._coalescing_manager():
        for out, n in zip(outs, (3, 5000), strict=True):
            dist.all_gather_into_tensor(out, numbers(rank, (n,), "float32"))
    for out, n in zip(outs, (3, 5000), strict=True):
        assert torch.equal(out, torch.cat([numbers(peer, (n,), "float32") for peer in range(size)]))
    with dist._coalescing_manager():
        for out, n in zip(outs, (3, 5000), strict=True):
            dist.reduce_scatter_tensor(
                out[:n], torch.cat([part_of(rank, index, n, "float32") for index in range(size)])
            )
    for out, n in zip(outs, (3, 5000), strict=True):
        assert torch.equal(out[:n], sum(part_of(peer, rank, n, "float32") for peer in range(size)))


def messages(rank: int, size: int) -> None:
    """Point to point before any collective, in a ring; then from anybody."""
    own, got = numbers(rank, (5,), "float32"), torch.empty(5)
    following, before = (rank + 1) % size, (rank - 1) % size
    operations = [dist.P2POp(dist.irecv, got, before), dist.P2POp(dist.isend, own, following)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert torch.equal(got, numbers(before, (5,), "float32"))
    if rank == 0:
        for _ in range(size - 1):
            sender = dist.recv(got)
            assert torch.equal(got, numbers(sender, (5,), "float32"))
    else:
        dist.send(own, 0)


def gloo_has_the_rest(rank: int, size: int) -> None:
    """What commlab has no loop for: bitwise reductions and sparse tensors."""
    bits = torch.tensor([1 << rank, 7])
    dist.all_reduce(bits, dist.ReduceOp.BOR)
    assert bits.tolist() == [2**size - 1, 7]
    sparse = torch.sparse_coo_tensor([[rank]], [rank + 1.0], (size,))
    dist.all_reduce(sparse)
    assert sparse.to_dense().tolist() == [float(peer + 1) for peer in range(size)]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("body", [reduce_scatters, gathers, alltoalls, coalesced, messages, gloo_has_the_rest])
def test_operations(forked: Forked, body: Any, size: int) -> None:
    forked(body, size)


@pytest.mark.parametrize("body", [reductions, reduce_scatters, gathers, alltoalls, coalesced, messages])
@pytest.mark.parametrize("environ", [{"COMMLAB_WINDOW": "off"}, {"COMMLAB_NODES": "2"}], ids=["no-window", "two-nodes"])
def test_without_a_common_window(forked: Forked, body: Any, environ: dict[str, str]) -> None:
    """The same where ranks share no memory, or only in pairs."""
    forked(body, 4 if "COMMLAB_NODES" in environ else 2, environ=environ, limit_s=100)


def objects(rank: int, size: int) -> None:
    """What torch pickles travels as bytes."""
    found: list[Any] = [None] * size
    dist.all_gather_object(found, {"rank": rank, "text": "x" * rank * 40_000})
    assert [one["rank"] for one in found] == list(range(size)) and len(found[-1]["text"]) == 40_000 * (size - 1)
    several: list[Any] = [rank, "b"]
    dist.broadcast_object_list(several, size - 1)
    assert several == [size - 1, "b"]
    own: list[Any] = [None]
    dist.scatter_object_list(own, [[peer] for peer in range(size)] if rank == 0 else None, 0)
    assert own == [[rank]]


def test_objects(forked: Forked) -> None:
    forked(objects, 3)


def saved(rank: int, size: int) -> None:
    leaf = nn.Parameter(torch.ones(size))
    ones = [torch.ones(1) for _ in range(size)]

    def exchanged(out: torch.Tensor) -> None:
        if rank == 0:
            dist.recv(out, 1)
        elif rank == 1:
            dist.send(out.detach(), 0)

    calls: dict[str, tuple[Callable[[torch.Tensor], object], bool | None]] = {
        "all_reduce": (dist.all_reduce, True),
        # At a root that only gives, and where the result is not wanted, torch may count a write of its own.
        "broadcast": (lambda out: dist.broadcast(out, 0), True if rank else None),
        "reduce": (lambda out: dist.reduce(out, 0), None if rank else True),
        "all_gather": (lambda out: dist.all_gather(list(out.split(1)), torch.ones(1)), True),
        "all_gather_into_tensor": (lambda out: dist.all_gather_into_tensor(out, torch.ones(1)), True),
        "reduce_scatter": (lambda out: dist.reduce_scatter(out[:1], ones), True),
        "gather": (lambda out: dist.gather(torch.ones(1), list(out.split(1)) if rank == 0 else None), rank == 0),
        "scatter": (lambda out: dist.scatter(out[:1], ones if rank == 0 else None), True),
        "all_to_all_single": (lambda out: dist.all_to_all_single(out, torch.ones(size)), True),
        "recv": (exchanged, rank == 0),
    }
    for name, (call, writes) in calls.items():
        overwritten = (leaf * 2).exp()
        loss = overwritten.sum()
        with torch.no_grad():
            call(overwritten)
        try:
            loss.backward()
        except RuntimeError as error:
            assert writes is not False and "modified by an inplace operation" in str(error), (name, error)
        else:
            assert not writes, name
        with torch.inference_mode():
            out = torch.ones(size)
        call(out)


@pytest.mark.parametrize("nodes", ["", "2"])
def test_autograd_hears_of_writes(forked: Forked, nodes: str) -> None:
    """What a forward pass has saved and an operation overwrites is torch's own error in backward, never a wrong
    gradient."""
    forked(saved, 3, environ={"COMMLAB_NODES": nodes} if nodes else {})


def left_by_one(rank: int, size: int) -> None:
    odd = rank == 1
    for make, op in (
        (
            lambda: torch.ones(4, dtype=torch.int8 if odd else torch.float32),
            getattr(dist.ReduceOp, "BOR" if odd else "SUM"),
        ),
        (lambda: torch.ones(4).to_sparse() if odd else torch.ones(4), dist.ReduceOp.SUM),
        (lambda: torch.ones(4, dtype=torch.int32), dist.ReduceOp.BAND if odd else dist.ReduceOp.SUM),
    ):
        with pytest.raises(DisagreementError, match=r"rank 1: allreduce #\d+ of .* \(by gloo, "):
            dist.all_reduce(make(), op)
        dist.all_reduce(after := torch.full((3,), rank + 1.0))
        assert after.tolist() == [size * (size + 1) / 2] * 3
    # Where all leave it, it keeps its place among the others.
    works, found = [], []
    for at in range(3):
        found += [torch.full((2,), 1 << rank), torch.full((5,), rank + at)]
        ops = (dist.ReduceOp.BOR, dist.ReduceOp.MAX)
        works += [dist.all_reduce(each, op, async_op=True) for each, op in zip(found[-2:], ops, strict=True)]
    works[-1].wait()
    for at, work in enumerate(works):
        work.wait()
        assert found[at].tolist() == ([2**size - 1] * 2 if at % 2 == 0 else [size - 1 + at // 2] * 5)


def test_what_one_rank_leaves_to_gloo_is_a_disagreement(forked: Forked) -> None:
    """B18: never another operation's numbers, and nobody waits."""
    forked(left_by_one, 3)


def elsewhere(rank: int, size: int) -> None:
    torch.set_default_device("meta")
    try:
        for dtype in (torch.float32, torch.bfloat16):
            own = torch.arange(6, device="cpu", dtype=dtype).view(2, 3) + rank
            total = torch.arange(6, device="cpu", dtype=dtype).view(2, 3) * size + sum(range(size))
            dist.all_reduce(got := own.t().clone().t())
            assert torch.equal(got, total)
            outs = [torch.empty(1 + peer, 3, device="cpu", dtype=dtype).t() for peer in range(size)]
            dist.all_gather(outs, own[:1].repeat(1 + rank, 1).t())
            assert all(
                torch.equal(out.t(), (own[:1] - rank + peer).expand(1 + peer, 3)) for peer, out in enumerate(outs)
            )
            dist.reduce_scatter(
                got := torch.empty(3, 2, device="cpu", dtype=dtype).t(), [own + at for at in range(size)]
            )
            assert torch.equal(got, total + rank * size)
            dist.all_to_all_single(got := torch.empty(size, 3, device="cpu", dtype=dtype), own[:1].repeat(size, 1))
            assert torch.equal(got, torch.cat([own[:1] - rank + peer for peer in range(size)]))
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("nodes", ["", "2"])
def test_a_default_device_is_the_programs(forked: Forked, nodes: str) -> None:
    """In a window, and between nodes."""
    forked(elsewhere, 3, environ={"COMMLAB_NODES": nodes} if nodes else {})


def alone(rank: int, size: int) -> None:
    for body in (reductions, reduce_scatters, gathers, alltoalls, coalesced):
        body(rank, size)


def test_one_rank(forked: Forked) -> None:
    forked(alone, 1)
