"""What an error leaves of a group: nothing after one that came in the middle, everything after a refusal."""

from __future__ import annotations

import re
import time

import pytest
import torch
from closed_form import expected, numbers
from mpi_ranks import Ranks

import commlab
from commlab.runtime.group import Group

pytestmark = pytest.mark.mpi(min_size=2)


def fresh(ranks: Ranks, messages: bool) -> Group:
    """A group that nobody needs afterwards: in messages, or with a window of its own."""
    from commlab.runtime.nodes import open_window

    group = ranks.subgroup(range(ranks.size))
    assert group is not None
    if not messages:
        open_window(group)
        if group.window is None:
            pytest.skip(group.window_reason)
    return group


@pytest.mark.parametrize("messages", [True, False], ids=["messages", "window"])
@pytest.mark.parametrize("numel", [3, 30_000])
def test_a_time_out_ends_the_group(ranks: Ranks, messages: bool, numel: int) -> None:
    """A16: the loop that catches it and goes on is told, at once, and pairs with nobody's operation."""
    group = fresh(ranks, messages)
    if group.rank == 0:
        group.progress.timeout_s = 0.3
        mine = numbers(0, numel, torch.float32)
        with pytest.raises(commlab.PeerTimeoutError, match="rank 0 has waited"):
            commlab.allreduce(mine, "sum", name="w", group=group)
        for call in (
            lambda: commlab.allreduce(mine, "sum", name="w", group=group),
            lambda: commlab.allreduce_async(mine, "sum", name="next", group=group),
            lambda: commlab.broadcast(mine, group=group),
            lambda: commlab.allreduce(mine.bool(), "no such op", group=group),
            lambda: group.subgroup([0, 1]),
            group.barrier,
        ):
            with pytest.raises(
                commlab.PeerTimeoutError, match=r"ended by an error in allreduce #\d+ 'w'.*PeerTimeoutError: rank 0 has"
            ):
                call()
    ranks.meet()
    if group.rank:
        group.progress.timeout_s = 2.0  # for each other they wait too, on a busy machine
        with pytest.raises(commlab.PeerTimeoutError, match=r"ranks? 0\b"):
            # The first pairs with what rank 0 has begun; the next one finds nobody.
            for _ in range(2):
                commlab.allreduce(numbers(group.rank, numel, torch.float32), "sum", name="w", group=group)
    ranks.world.barrier()


def test_a_handle_may_be_waited_for_again(ranks: Ranks) -> None:
    """A16: a wait with a limit of its own loses nothing; until it ends well, nothing else starts."""
    group = fresh(ranks, messages=True)
    if group.rank == 0:
        handle = commlab.allreduce_async(numbers(0, 10, torch.float32), "sum", group=group)
        with pytest.raises(commlab.PeerTimeoutError):
            handle.wait(timeout_s=0.1)
        with pytest.raises(commlab.PeerTimeoutError, match="was ended by"):
            commlab.allreduce(torch.ones(2), group=group)
        ranks.meet()
    else:
        ranks.meet()
        handle = commlab.allreduce_async(numbers(group.rank, 10, torch.float32), "sum", group=group)
    assert torch.equal(handle.wait(), expected("sum", group.size, 10, torch.float32))
    commlab.allreduce(torch.ones(2), group=group)


def test_an_error_in_the_middle_ends_the_group(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A16: also what is queued behind it; a disagreement ends nothing."""
    group = fresh(ranks, messages=True)
    with pytest.raises(commlab.DisagreementError):
        commlab.allreduce(torch.ones(2 + group.rank % 2), group=group)
    group.barrier()
    from commlab import native

    if group.rank == 0:

        def broken(*_: object) -> None:
            raise ValueError("out of order")

        monkeypatch.setattr(native, "reduce", broken)
        first, second = (
            commlab.allreduce_async(torch.ones(30_000), name=name, algorithm="ring", group=group) for name in "ab"
        )
        with pytest.raises(ValueError, match="out of order"):
            first.wait()
        words = r"ended by an error in allreduce #\d+ 'a' of .*\(ValueError: out of order\)"
        with pytest.raises(commlab.CommlabError, match=r"allreduce #\d+ 'b'.* " + words):
            second.wait()
        with pytest.raises(commlab.CommlabError, match=words):
            commlab.barrier(group=group)
        monkeypatch.undo()
    else:
        group.progress.timeout_s = 1.0
        handles = [
            commlab.allreduce_async(torch.ones(30_000), name=name, algorithm="ring", group=group) for name in "ab"
        ]
        with pytest.raises(commlab.PeerTimeoutError):
            for handle in handles:
                handle.wait()
    ranks.world.barrier()


def test_long_texts_show_where_they_differ(ranks: Ranks) -> None:
    """B12: chunks of a thousand numbers, names of a thousand letters."""
    for group in (ranks.world, fresh(ranks, messages=True)):
        name = "layer." * 400 + ("left" if group.rank == 1 else "right") + ".weight" * 300
        with pytest.raises(commlab.DisagreementError) as caught:
            commlab.allreduce(torch.ones(3), name=name, group=group)
        message = str(caught.value)
        assert re.search(r"rank 1: allreduce #\d+ 'layer\.[^;]*\.left\.weight", message)
        assert re.search(r"rank.? 0[^;]*: allreduce #\d+ 'layer\.[^;]*\.right\.weight", message)
        assert len(message) < 1600
        group.barrier()


def test_two_threads_in_one_group(ranks: Ranks) -> None:
    """B12: a call while another thread waits in one of the same group is refused by name, on all ranks."""
    import threading

    for group in (ranks.world, fresh(ranks, messages=True)):
        caught: list[BaseException] = []
        ready = threading.Event()

        def waits(group: Group = group, ready: threading.Event = ready) -> None:
            ready.set()
            commlab.broadcast(torch.ones(3), name="mine", group=group)

        if group.rank == 0:
            thread = threading.Thread(target=waits)
            thread.start()
            ready.wait()
            time.sleep(0.05)
            try:
                commlab.broadcast(torch.ones(3), name="other", group=group)
            except commlab.CommlabError as error:
                caught.append(error)
            thread.join()
        else:
            time.sleep(0.3)
            commlab.broadcast(torch.ones(3), name="mine", group=group)
            try:
                commlab.broadcast(torch.ones(3), name="other", group=group)
            except commlab.CommlabError as error:
                caught.append(error)
        assert re.search(r"rank 0: .*another thread of this rank waits in allgather #\d+ 'mine'", str(caught[0]))
        group.barrier()
