"""What goes wrong in the window of 8 ranks, and what is left behind: calls that disagree, a rank that can't have one,
memory given back and used again, groups that are closed."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from closed_form import expected, numbers
from mpi_ranks import Ranks
from mpi_windows import close_all, in_window, mixed, ordinary, window_groups
from torch import Tensor

import commlab
from commlab.runtime.group import Group
from commlab.runtime.nodes import open_window
from commlab.window import memfd
from commlab.window.memory import _CARD, Window

pytestmark = pytest.mark.usefixtures("small_heap")


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_all()


Call = Callable[[Group, Tensor], object]
CASES: dict[str, tuple[Call, Call, str, str]] = {
    "op": (
        lambda group, x: commlab.allreduce(x, "max", group=group),
        lambda group, x: commlab.allreduce(x, "min", group=group),
        r"\(max, window,",
        r"\(min, window,",
    ),
    "dtype": (
        lambda group, x: commlab.allreduce(x, "sum", group=group),
        lambda group, x: commlab.allreduce(x.view(torch.int32), "sum", group=group),
        r"of float32\[",
        r"of int32\[",
    ),
    "shape": (
        lambda group, x: commlab.allreduce(x.view(2, -1), group=group),
        lambda group, x: commlab.allreduce(x.view(-1, 2), group=group),
        r"of float32\[2, ",
        r"of float32\[\d+, 2\]",
    ),
    "count": (
        lambda group, x: commlab.allreduce(x, group=group),
        lambda group, x: commlab.allreduce(x[:-1], group=group),
        r"of float32\[\d*[02468]\]",
        r"of float32\[\d*[13579]\]",
    ),
    "name": (
        lambda group, x: commlab.allreduce(x, name="weight", group=group),
        lambda group, x: commlab.allreduce(x, name="bias", group=group),
        r"'weight' of",
        r"'bias' of",
    ),
    "kind": (
        lambda group, x: commlab.allreduce(x, group=group),
        lambda group, x: commlab.broadcast(x, group=group),
        r"allreduce #\d+ of",
        r"allgather #\d+ of",
    ),
    "wire": (
        lambda group, x: commlab.allreduce(x, group=group),
        lambda group, x: commlab.allreduce(x, wire="fp16", group=group),
        r"wire as is",
        r"wire fp16",
    ),
    "algorithm": (
        lambda group, x: commlab.allreduce(x, group=group),
        lambda group, x: commlab.allreduce(x, algorithm="tree", group=group),
        r"\(mean, window,",
        r"\(mean, tree,",
    ),
    "nothing but a barrier": (
        lambda group, x: commlab.allreduce(x, group=group),
        lambda group, x: group.barrier(),
        r"allreduce #\d+ of",
        r"barrier #\d+",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_disagreement(ranks: Ranks, case: str) -> None:
    """Found in the window, told by messages; nothing is reduced, and the next operation is sound."""
    usual, strange, usual_words, strange_words = CASES[case]
    for group in window_groups(ranks):
        for numel, place in ((6, in_window), (6, ordinary), (4000, in_window), (4000, mixed)):
            outsider = (numel + group.size) % group.size
            given = numbers(group.rank, numel, torch.float32)
            mine = place(group, given)
            with pytest.raises(commlab.DisagreementError) as caught:
                (strange if group.rank == outsider else usual)(group, mine)
            message = str(caught.value)
            assert message.startswith(f"ranks disagree (seen on rank {group.rank}): ")
            assert re.search(rf"ranks? [^;]*: [^;]*{usual_words}", message), message
            assert re.search(rf"rank {outsider}: [^;]*{strange_words}", message), message
            assert torch.equal(mine, given), "it was touched"
            got = commlab.allreduce(mine, "sum", group=group)
            assert torch.equal(got, expected("sum", group.size, numel, torch.float32))


def mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:commlab")


def test_memory_is_given_back_and_used_again(ranks: Ranks) -> None:
    for group in window_groups(ranks):
        window = group.window
        assert window is not None
        seen = set()
        for turn in range(5):
            memory, place = window.allocate(100_000)
            seen.add(place)
            numel = 25_000 - turn
            mine = memory.view(torch.float32)[:numel].copy_(numbers(group.rank, numel, torch.float32))
            commlab.allreduce(mine, "sum", group=group)
            assert torch.equal(mine, expected("sum", group.size, numel, torch.float32))
            window.free(memory)
        assert len(seen) == 1


def wrong_token(window: Window, card: bytes) -> bytes:
    return _CARD.pack(*_CARD.unpack(card)[:3], b"not the token...")


def no_process(window: Window, card: bytes) -> bytes:
    return _CARD.pack(2**22 + 1, *_CARD.unpack(card)[1:])


def anothers(window: Window, card: bytes) -> bytes:
    """This rank says that it is what it is not."""
    window._native.format_page(window._control.address, 0, _CARD.unpack(card)[3])
    return card


UNAVAILABLE = {
    "wrong token": (wrong_token, r"process \d+, said to be local rank 1, shows another job's window"),
    "no such process": (no_process, r"cannot open the control page of local rank 1 of process 4194305"),
    "another rank": (anothers, r"process \d+, said to be local rank 1, shows the window of local rank 0"),
    "no memory": (None, r"no 5 MiB of shared memory for the window of this rank: 3 MiB are left \(a limit\)"),
}


@pytest.mark.parametrize("case", UNAVAILABLE)
def test_where_one_rank_has_no_window_none_has(ranks: Ranks, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    doctor, message = UNAVAILABLE[case]
    group = ranks.subgroup(range(ranks.size))
    assert group is not None
    before = mappings()
    if group.rank == 1:
        if doctor is None:
            monkeypatch.setattr(memfd, "available_memory", lambda: (3 * 2**20, "a limit"))
        else:
            card = Window.card
            monkeypatch.setattr(Window, "card", lambda window: doctor(window, card(window)))
    open_window(group)
    assert group.window is None
    assert re.fullmatch(f"{message}.*", group.window_reason), group.window_reason
    assert mappings() == before, "what was made is given back"
    for numel in (5, 5000):
        got = commlab.allreduce(commlab.empty(numel, group=group) + group.rank, "sum", group=group)
        assert (got == group.size * (group.size - 1) / 2).all()
    with pytest.raises(commlab.UsageError, match=f"rank {group.rank}: algorithm window is not to be had: {message}"):
        commlab.allreduce(torch.ones(5), algorithm="window", group=group)
    group.close()


def test_memory_that_is_gone_when_it_is_needed(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The staging area is made by the first large operation. Where that has no memory it is refused on all ranks, and
    nothing was moved; small ones go on, and so do large ones once there is memory again."""
    group = ranks.subgroup(range(ranks.size))
    assert group is not None
    open_window(group)
    large = torch.full((50_000,), float(group.rank))
    rows, got = torch.full((group.size * 20_000,), float(group.rank)), torch.empty(group.size * 20_000)
    with monkeypatch.context() as patched:
        if group.rank == 1:

            def full(fd: int, offset: int, size_bytes: int) -> None:
                raise OSError(28, os.strerror(28))

            patched.setattr(os, "posix_fallocate", full)
        for call in (
            lambda: commlab.allreduce(large, "sum", group=group),
            lambda: commlab.alltoall(got, rows, group=group),
        ):
            with pytest.raises(commlab.RefusedError, match=r"rank 1.*no 5 MiB of shared memory for segment 0"):
                call()
        assert (large == group.rank).all()
        assert commlab.allreduce(torch.ones(5), "sum", group=group)[0] == group.size
    assert (commlab.allreduce(large, "sum", group=group) == group.size * (group.size - 1) / 2).all()
    commlab.alltoall(got, rows, group=group)
    assert got.view(group.size, -1)[:, -1].tolist() == list(range(group.size))
    group.close()


def test_closed_groups_leave_nothing_behind(ranks: Ranks) -> None:
    """Five times; a tensor that somebody keeps stays what it was, and goes when it is let go."""
    before = mappings(), len(os.listdir("/proc/self/fd"))
    for turn in range(5):
        group = ranks.subgroup(range(ranks.size))
        assert group is not None
        open_window(group)
        kept = commlab.empty(10_000, group=group).fill_(turn + group.rank)
        large = commlab.empty(3 * 2**20, group=group).fill_(1.0)
        for tensor in (kept, large):
            commlab.allreduce(tensor, "sum", group=group)
        group.close()
        group.close()
        with pytest.raises(commlab.UsageError, match="on a group that was shut down"):
            commlab.allreduce(kept, group=group)
        del large, tensor
        assert mappings() == before[0] + 1, "the one that holds `kept`"
        assert (kept == group.size * turn + group.size * (group.size - 1) / 2).all()
        kept.fill_(5.0)
        del kept
        del group
        assert (mappings(), len(os.listdir("/proc/self/fd"))) == before
