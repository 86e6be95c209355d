"""What operations of Horovod's API refuse: tensors of one rank that can't be reduced, what ranks disagree about; and
ranks that die or shut down."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from forked import RankFailed
from refused import message

import commlab.horovod.torch as hvd


def one_sided(rank: int, size: int) -> bool:
    """B18: what rank 1's tensor can't do is told to all under the operation's name, and all go on."""
    hvd.init()
    odd: dict[str, tuple[Callable[[], Any], str]] = {
        "expanded": (lambda: torch.ones(1).expand(6), "share one place in memory"),
        "overlapping": (lambda: torch.ones(7).as_strided((3, 2), (1, 1)), "share one place in memory"),
        "meta": (lambda: torch.ones(6, device="meta"), "device meta"),
        "numpy": (lambda: torch.ones(6).numpy(), "no tensor"),
        "sparse": (lambda: torch.eye(6).to_sparse(), "sparse_coo"),
    }
    for case, (make, words) in odd.items():
        for call in (
            lambda x: hvd.allreduce_(x, op=hvd.Sum),
            lambda x: hvd.grouped_allreduce_([torch.ones(3), x]),
            lambda x: hvd.broadcast_(x, 0),
            *([] if "share" in words else [lambda x: hvd.allgather(x), lambda x: hvd.alltoall(x)]),
        ):
            given = make() if rank == 1 else torch.ones(3, 2) if case == "overlapping" else torch.ones(6)
            assert re.search(words, message(lambda: call(given))), case  # noqa: B023
    ones = torch.ones(2)
    for grouped in (hvd.grouped_allreduce, hvd.grouped_allreduce_, hvd.grouped_allgather, hvd.grouped_reducescatter):
        for few in ([], [] if rank == 1 else [ones]):
            assert "a grouped operation of no tensors" in message(lambda: grouped(few)), grouped  # noqa: B023
    assert "could not convert" in message(
        lambda: hvd.allreduce(torch.ones(2), prescale_factor="x" if rank == 1 else 1.0)
    )
    for neg in (torch._neg_view(torch.tensor([1.0, -2.0])), torch.tensor([1.0, -2.0])[::1]):
        want = neg.clone() * size
        hvd.allreduce_(neg, op=hvd.Sum)
        assert torch.equal(neg, want)
    return True


def test_what_one_rank_can_not(forked: Callable[..., list[Any]]) -> None:
    assert all(forked(one_sided, 3))


def disagreements(rank: int, size: int) -> list[str]:
    hvd.init(timeout_s=1.5)
    found = [
        message(lambda: hvd.allreduce(torch.ones(3 + rank), name="shape")),
        message(lambda: hvd.allreduce(torch.ones(3, dtype=torch.int32 if rank else torch.float32), name="dtype")),
        message(lambda: hvd.allreduce(torch.ones(3), name="op", op=hvd.Min if rank else hvd.Max)),
        message(lambda: hvd.broadcast(torch.ones(3), rank, name="root")),
        message(lambda: hvd.allgather(torch.ones(2, 3 + rank), name="rows")),
        message(lambda: hvd.allreduce(torch.tensor(1.0) if rank else torch.ones(1), name="scalar")),
        # One rank's arguments can't be: the other one is told.
        message(lambda: hvd.alltoall(torch.ones(4), [1, 1 + 9 * rank], name="splits")),
    ]
    handle = hvd.allreduce_async(torch.ones(1), name="twice")
    found.append(message(lambda: [hvd.allreduce_async(torch.ones(1), name="twice") for _ in range(2)]))
    hvd.synchronize(handle)
    assert hvd.allreduce(torch.ones(2), op=hvd.Sum).sum() == 2 * size  # all of that has harmed nothing
    if rank == 0:
        found.append(message(lambda: hvd.allreduce(torch.ones(1), name="only here")))
    else:
        time.sleep(3)
        found.append(message(lambda: hvd.allreduce(torch.ones(1), name="later")))
    found.append(message(lambda: hvd.allreduce(torch.ones(1))))
    return found


def test_disagreements(forked: Callable[..., list[Any]]) -> None:
    """Errors on all ranks, with the tensor's name, ranks, and both sides."""
    for rank, found in enumerate(forked(disagreements)):
        shape, dtype, op, root, rows, scalar, splits, twice, alone, after = found
        assert "'allreduce.shape'" in shape
        assert "rank 0: allreduce of float32[3]" in shape and "rank 1: allreduce of float32[4]" in shape
        assert "float32[3]" in dtype and "int32[3]" in dtype
        assert "rank 0" in op and "max" in op and "min" in op
        assert "root 0" in root and "root 1" in root
        assert "float32[2, 3]" in rows and "float32[2, 4]" in rows
        assert "float32[1]" in scalar and "float32[]" in scalar
        assert "[1, 10]" in splits and "rank 1: alltoall" in splits
        assert "'allreduce.twice'" in twice and f"rank {rank}" in twice
        if rank == 0:
            assert "rank 0 gave up" in alone and "'allreduce.only here'" in alone and "rank 1 has not" in alone
        else:
            assert "rank 0 has given up" in alone and "only here" in alone
        assert "gave up" in after or "given up" in after


def dies(rank: int, size: int) -> str:
    hvd.init()
    hvd.barrier()
    if rank == 1:
        os._exit(3)
    since_s = time.monotonic()
    text = message(lambda: hvd.allreduce(torch.ones(1), name="last"))
    assert "rank 1" in text and time.monotonic() - since_s < 10, text
    assert "rank 1" in message(lambda: hvd.allreduce(torch.ones(1), name="next"))
    return text


def test_a_rank_dies(forked: Callable[..., list[Any]]) -> None:
    """Whoever waits for it is told at once, and does not wait any more."""
    with pytest.raises(RankFailed, match=r"^rank 1: ended with 3, saying nothing$"):
        forked(dies)


def leaves(rank: int, size: int) -> str:
    hvd.init()
    hvd.barrier()
    if rank == 1:
        hvd.shutdown()
        assert not hvd.is_initialized()
        hvd.init()
    text = message(lambda: hvd.allreduce(torch.ones(1), name="last")) if rank == 0 else ""
    if rank == 0:
        hvd.shutdown()
        hvd.init()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum) == 2
    hvd.shutdown()
    return text


def test_shutdown_and_init(forked: Callable[..., list[Any]]) -> None:
    """Who waits for a rank that has shut down learns of it at once; all may begin anew."""
    assert "rank 1 has called shutdown()" in forked(leaves)[0]
