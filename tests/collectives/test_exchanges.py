"""alltoall, gather, scatter, parts of any size, grouped allreduce and objects: over messages, on ranks that are
threads, and through the window of real processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from crew import Crew, groups
from forked import Forked

import commlab
from commlab.errors import DisagreementError, UsageError
from commlab.runtime.group import Group

DTYPES = (torch.float32, torch.uint8, torch.bool, torch.complex64, torch.bfloat16)


def numbers(frm: int, to: int, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What rank ``frm`` has for rank ``to``: distinct for each pair and index."""
    return ((torch.arange(rows * 3) * 5 + 11 * frm + 3 * to) % 97).to(dtype).view(rows, 3)


def alltoalls(group: Group) -> None:
    rank, size = group.rank, group.size
    for dtype in DTYPES:
        for rows in (0, 1, 5, 4001):
            sent = torch.cat([numbers(rank, peer, rows, dtype) for peer in range(size)])
            out = torch.zeros_like(sent)
            assert commlab.alltoall(out, sent, group=group) is out
            assert torch.equal(out, torch.cat([numbers(peer, rank, rows, dtype) for peer in range(size)]))
    for scale in (1, 3001):
        splits = [scale * ((rank + 2 * peer) % 4) for peer in range(size)]
        back = [scale * ((peer + 2 * rank) % 4) for peer in range(size)]
        sent = torch.cat([numbers(rank, peer, rows) for peer, rows in enumerate(splits)])
        # Neither side need be contiguous.
        out = torch.zeros(3, sum(back)).t()
        commlab.alltoall(out, sent.t().contiguous().t(), back, splits, group=group)
        assert torch.equal(out, torch.cat([numbers(peer, rank, rows) for peer, rows in enumerate(back)]))


def gathers(group: Group) -> None:
    rank, size = group.rank, group.size
    for root in (0, size - 1):
        for rows in (1, 7000):
            own = numbers(rank, 0, rows + rank)
            outs = [torch.zeros(rows + peer, 3) for peer in range(size)] if rank == root else None
            found = commlab.gather(outs, own, root, group=group)
            assert (found is None) == (rank != root)
            for peer, out in enumerate(outs or ()):
                assert torch.equal(out, numbers(peer, 0, rows + peer))
            parts = [numbers(root, peer, rows + peer) for peer in range(size)] if rank == root else None
            got = commlab.scatter(torch.zeros(rows + rank, 3), parts, root, group=group)
            assert torch.equal(got, numbers(root, rank, rows + rank))


def parts_of_any_size(group: Group) -> None:
    rank, size = group.rank, group.size
    for scale in (0, 1, 9001):
        found = commlab.allgather_parts(numbers(rank, 1, scale * rank), group=group)
        assert [len(part) for part in found] == [scale * peer for peer in range(size)]
        assert all(torch.equal(part, numbers(peer, 1, scale * peer)) for peer, part in enumerate(found))
    assert [int(part) for part in commlab.allgather_parts(torch.tensor(rank + 4), group=group)] == [
        peer + 4 for peer in range(size)
    ]


def many_at_once(group: Group) -> None:
    rank, size = group.rank, group.size
    shapes = ((3,), (), (2, 5), (0,), (4001,))
    tensors = [
        torch.full(shape, rank + at + 1.0, dtype=dtype)
        for at, shape in enumerate(shapes)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    assert commlab.grouped_allreduce(tensors, "sum", group=group) is tensors
    for at, tensor in enumerate(tensors):
        assert (tensor == size * (size - 1) / 2 + size * (at // 3 + 1)).all()


def objects(group: Group) -> None:
    rank, size = group.rank, group.size

    def tree(of: int) -> dict[Any, Any]:
        return {"rank": of, 3: (1.5, None, [True, "text" * 5000 * of]), "tensors": {"a": torch.full((of, 2), of * 1.0)}}

    found = commlab.allgather_object(tree(rank), group=group)
    for peer, one in enumerate(found):
        assert one["rank"] == peer and one[3] == (1.5, None, [True, "text" * 5000 * peer])
        assert torch.equal(one["tensors"]["a"], torch.full((peer, 2), peer * 1.0))
    assert commlab.broadcast_object(("a", 0.1) if rank == 1 else object(), root=1, group=group) == ("a", 0.1)
    words = {"set": {1, 2, rank}}
    with pytest.raises(
        UsageError, match=r"rank 0: allgather_object.*allow_pickle=True cannot hold state\['set'\], a set"
    ):
        commlab.allgather_object(words, group=group)
    with pytest.raises(UsageError, match="rank 1: broadcast_object"):
        commlab.broadcast_object(words if rank == 1 else None, 1, group=group)
    assert commlab.allgather_object(words, True, group=group) == [{"set": {1, 2, peer}} for peer in range(size)]
    assert commlab.broadcast_object(words, 1, True, group=group) == {"set": {1, 2}}


def kinds(group: Group) -> None:
    """A1, A9, B22, B24 of the exchanges: what shares memory, what autograd has saved, what has no numbers."""
    rank, size = group.rank, group.size
    for rows in (2, 4001):
        # In place, and the same part for every rank.
        both = torch.cat([numbers(rank, peer, rows) for peer in range(size)])
        commlab.alltoall(both, both, group=group)
        assert torch.equal(both, torch.cat([numbers(peer, rank, rows) for peer in range(size)]))
        got = commlab.scatter(torch.zeros(rows, 3), [numbers(1, 1, rows)] * size, 1, group=group)
        assert torch.equal(got, numbers(1, 1, rows))
        own = numbers(rank, 0, rows)
        outs = [own if peer == rank else torch.zeros(rows, 3) for peer in range(size)] if rank == 1 else None
        assert all(
            torch.equal(o, numbers(p, 0, rows)) for p, o in enumerate(commlab.gather(outs, own, 1, group=group) or ())
        )
    leaf = torch.nn.Parameter(torch.ones(size))
    calls: tuple[Callable[[torch.Tensor], object], ...] = (
        lambda out: commlab.alltoall(out, torch.ones(size), group=group),
        lambda out: commlab.scatter(out, [torch.ones(size)] * size, group=group),
        lambda out: commlab.gather(
            [out, *(torch.ones(size) for _ in range(size - 1))], torch.ones(size), rank * 0, group=group
        ),
        lambda out: commlab.grouped_allreduce([out], group=group),
    )
    for at, call in enumerate(calls):
        saved = (leaf * 2).exp()
        loss = saved.sum()
        call(saved)
        if at != 2 or rank == 0:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        with torch.inference_mode():
            out = torch.zeros(size)
        call(out)
    assert [tuple(part.shape) for part in commlab.allgather_parts(torch.ones(3 + rank, 0, 2), group=group)] == [
        (3 + peer, 0, 2) for peer in range(size)
    ]
    scaled = torch.quantize_per_tensor(numbers(rank, 0, 4 + rank), 0.5, 3, torch.quint8)
    for peer, part in enumerate(commlab.allgather_parts(scaled, group=group)):
        assert torch.equal(
            part.int_repr(), torch.quantize_per_tensor(numbers(peer, 0, 4 + peer), 0.5, 3, torch.quint8).int_repr()
        )
    objects = commlab.allgather_object(
        [scaled, own.to(torch.complex64).conj(), torch._neg_view(torch.ones(2))], group=group
    )
    assert torch.equal(objects[rank][0].int_repr(), scaled.int_repr()) and torch.equal(objects[rank][2], -torch.ones(2))
    parts = commlab.allgather_parts((own * (1 + 1j)).conj(), group=group)
    assert torch.equal(parts[rank], (own * (1 - 1j)))


def disagreements(group: Group) -> None:
    """Both sides are named, on every rank, and the group goes on."""
    rank, size = group.rank, group.size
    splits = [2] * size
    splits[1] += rank == 0
    with pytest.raises(DisagreementError, match=r"alltoall: rank 0 sends 36 bytes to rank 1, which expects 24"):
        commlab.alltoall(torch.zeros(2 * size, 3), torch.zeros(sum(splits), 3), None, splits, group=group)
    with pytest.raises(DisagreementError, match=r"root 0.*root 1|root 1.*root 0"):
        commlab.gather([torch.zeros(1) for _ in range(size)], torch.ones(1), min(rank, 1), group=group)
    with pytest.raises(DisagreementError, match="pickles allowed"):
        commlab.allgather_object(1, allow_pickle=rank == 0, group=group)
    with pytest.raises(UsageError, match=rf"rank {rank}: scatter of .*: 1 tensors among {size}"):
        commlab.scatter(torch.zeros(1), [torch.zeros(1)], rank, group=group)
    with pytest.raises(UsageError, match=f"rank {rank}: alltoall of .* rows of the first dimension"):
        commlab.alltoall(torch.zeros(size), torch.zeros(size + 1), group=group)
    alltoalls(group)


BODIES: tuple[Callable[[Group], None], ...] = (
    *(alltoalls, gathers, parts_of_any_size, many_at_once, objects, kinds, disagreements),
)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_over_messages(body: Callable[[Group], None], size: int) -> None:
    crew, everyone = Crew(size), groups(size)
    try:
        crew.all(lambda rank: body(everyone[rank]))
    finally:
        crew.close()


def in_a_window(rank: int, size: int) -> bool:
    import torch.distributed as dist

    group: Group = dist.group.WORLD.group  # type: ignore[union-attr, attr-defined]
    for body in BODIES:
        body(group)
    return group.window is not None


@pytest.mark.parametrize("size", [2, 3])
def test_in_a_window(forked: Forked, size: int) -> None:
    assert forked(in_a_window, size) == [True] * size
