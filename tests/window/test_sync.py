"""How the ranks of a node wait for each other: real processes over shared memory, the "
"counters' ends, sleep and death."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import needs_native

from commlab.native import library

pytestmark = needs_native
DEADLINE_S = 30.0
"""How long a process may take; far from both a wait that is awakened and the ones that nobody wakes."""
NOBODY_WAKES_US = 1e9
TOKEN = b"0123456789abcdef"


class Node:
    """Ranks whose pages lie in anonymous shared memory, at the same addresses in all processes "
    "that are forked later."""

    def __init__(self, size: int, arrived: int = 0):
        self.size = size
        stride = -(-library.built.CONTROL_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, size * stride + mmap.PAGESIZE)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.pages = [self.bytes.data_ptr() + rank * stride for rank in range(size)]
        for rank in range(size):
            library.built.format_page(self.pages[rank], rank, TOKEN)
            struct.pack_into("<I", self.memory, rank * stride + counter_offset(), arrived)
        self.notes = torch.frombuffer(self.memory, dtype=torch.int64, offset=size * stride)
        """Numbers that all processes see."""
        self.children: list[int] = []

    def sync(self, rank: int, spin_us: float = 0.0) -> Any:
        return library.built.NodeSync(rank, self.pages, spin_us)

    def start(self, rank: int, work: Callable[[Any], object], spin_us: float = 0.0) -> int:
        """Run ``work(sync)`` as this rank in a process of its own, which fails when that raises or returns False."""
        with warnings.catch_warnings():
            # Newer Pythons warn of threads. The child runs native code that takes no lock, and leaves.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid:
            self.children.append(pid)
            return pid
        code = 1
        try:
            code = 1 if work(self.sync(rank, spin_us)) is False else 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def end(self, pid: int) -> int:
        """The exit status of a process that ends by itself; negative: the signal that ended it."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.children.remove(pid)
                return os.waitstatus_to_exitcode(status)
            time.sleep(1e-3)
        pytest.fail(f"process {pid} still waits after {DEADLINE_S:.0f} s")

    def close(self) -> None:
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.children.clear()


def counter_offset() -> int:
    """Where a page counts its arrivals: an arrival changes nothing else."""
    size = library.built.CONTROL_BYTES
    page = torch.zeros(2 * size + 64, dtype=torch.uint8)
    start = -page.data_ptr() % 64
    pages = [page.data_ptr() + start, page.data_ptr() + start + size]
    for rank in (0, 1):
        library.built.format_page(pages[rank], rank, TOKEN)
    before = page.clone()
    library.built.NodeSync(0, pages, 0.0).arrive()
    (changed,) = (page != before).nonzero().flatten().tolist()
    return int(changed) - start


@pytest.fixture
def node() -> Iterator[Callable[..., Node]]:
    made: list[Node] = []

    def make(size: int, arrived: int = 0) -> Node:
        made.append(Node(size, arrived))
        return made[-1]

    yield make
    for each in made:
        each.close()


def asleep(pid: int) -> bool:
    """Whether the process lies in a futex, as far as the kernel tells."""
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "S"


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(1e-3)


def meet_often(node: Node, rank: int, rounds: int) -> Callable[[Any], None]:
    """Write, arrive, wait, and look at what the others have written."""

    def work(sync: Any) -> None:
        for turn in range(1, rounds + 1):
            node.notes[rank] = turn
            sync.arrive()
            late = sync.wait(NOBODY_WAKES_US)
            seen = node.notes[: node.size].tolist()
            assert late == -1, late
            # Whoever has left this wait already is at most one round ahead.
            assert all(turn <= other <= turn + 1 for other in seen), (turn, seen)

    return work


@pytest.mark.parametrize("spin_us", [0.0, 50.0], ids=["asleep at once", "looks first"])
@pytest.mark.parametrize("size, arrived", [(2, 0), (4, 0), (3, 2**32 - 700), (3, 2**31 - 700)])
def test_nobody_goes_on_before_all_have_arrived(node: Any, size: int, arrived: int, spin_us: float) -> None:
    """2,000 times; the counters pass their ends on the way."""
    ranks = node(size, arrived)
    rounds = 2000
    pids = [ranks.start(rank, meet_often(ranks, rank, rounds), spin_us) for rank in range(size)]
    assert [ranks.end(pid) for pid in pids] == [0] * size
    assert ranks.notes[:size].tolist() == [rounds] * size
    for rank in range(size):
        at = ranks.pages[rank] - ranks.pages[0] + counter_offset()
        assert struct.unpack_from("<I", ranks.memory, at)[0] == (arrived + rounds) % 2**32


def test_a_sleeper_is_awakened(node: Any) -> None:
    """Its own limit is far beyond what the test waits for."""
    ranks = node(2)

    def work(sync: Any) -> bool:
        sync.arrive()
        return bool(sync.wait(NOBODY_WAKES_US) == -1)

    mine = ranks.sync(1)
    for _ in range(20):
        pid = ranks.start(0, work)
        until(lambda: asleep(pid))  # noqa: B023
        mine.arrive()
        assert ranks.end(pid) == 0
        assert mine.lagging() == -1


@pytest.mark.parametrize("spin_us", [0.0, 500.0], ids=["asleep at once", "looks first"])
def test_a_wait_ends_in_time_and_names_the_lowest_late_rank(node: Any, spin_us: float) -> None:
    ranks = node(4)
    syncs = [ranks.sync(rank, spin_us) for rank in range(4)]
    syncs[2].arrive()
    syncs[3].arrive()
    for timeout_us in (0.0, 100.0, 20_000.0):
        began_s = time.perf_counter()
        assert syncs[3].wait(timeout_us) == 0
        assert time.perf_counter() - began_s >= timeout_us / 1e6
    syncs[0].arrive()
    assert syncs[3].wait(0.0) == syncs[2].lagging() == 1
    syncs[1].arrive()
    assert [sync.wait(0.0) for sync in syncs] == [-1] * 4


def test_waits_that_a_look_does_not_see_the_end_of_look_less(node: Any) -> None:
    """A look of 2 ms in vain is 2 ms of a core that others may want, also where nobody can count them (hosts that are
    containers of one machine). Asleep at once stays asleep at once."""
    ranks = node(2)
    sync, peer = ranks.sync(0, 2000.0), ranks.sync(1)
    assert sync.look_us == 2000.0 and peer.look_us == 0.0
    sync.arrive()
    looks_us = []
    for _ in range(12):
        assert sync.wait(2500.0) == 1
        looks_us.append(sync.look_us)
    assert looks_us[-1] == 20.0 and looks_us == sorted(looks_us, reverse=True)
    peer.arrive()
    assert sync.wait(0.0) == -1
    peer.arrive()
    assert peer.wait(100.0) == 0 and peer.look_us == 0.0


def test_a_killed_sleeper_leaves_nothing_held(node: Any) -> None:
    """It is counted as asleep for ever, and the others meet all the same; only it is late."""
    ranks = node(3)

    def sleeps(sync: Any) -> None:
        sync.arrive()
        sync.wait(NOBODY_WAKES_US)

    pid = ranks.start(2, sleeps)
    until(lambda: asleep(pid))
    os.kill(pid, signal.SIGKILL)
    assert ranks.end(pid) == -signal.SIGKILL
    first, second = ranks.sync(0), ranks.sync(1)
    first.arrive()
    second.arrive()
    assert (first.wait(0.0), second.wait(0.0)) == (-1, -1), "it had arrived before it died"
    for _ in range(3):
        first.arrive()
        assert first.wait(0.0) == 1
        second.arrive()
        assert first.wait(1000.0) == second.wait(1000.0) == 2


def test_a_signal_does_not_end_a_wait_early(node: Any) -> None:
    ranks = node(2)

    def work(sync: Any) -> bool:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        ranks.notes[0] = 1
        sync.arrive()
        return bool(sync.wait(NOBODY_WAKES_US) == -1)

    pid = ranks.start(0, work)
    until(lambda: int(ranks.notes[0]) == 1 and asleep(pid))
    for _ in range(5):
        os.kill(pid, signal.SIGUSR1)
        time.sleep(2e-3)
    until(lambda: asleep(pid))
    ranks.sync(1).arrive()
    assert ranks.end(pid) == 0


def test_what_ranks_publish(node: Any) -> None:
    """Records, places and small payloads are seen by all after the wait, and stay until everyone has been back."""
    ranks = node(3)
    syncs = [ranks.sync(rank) for rank in range(3)]
    for turn in range(1, 6):
        payloads = [torch.arange(turn * 8, dtype=torch.int64) * 3 + rank for rank in range(3)]
        for rank, sync in enumerate(syncs):
            size_bytes = payloads[rank].numel() * 8
            sync.publish(turn if turn != 4 else rank, 7 * rank, turn + rank, payloads[rank].data_ptr(), size_bytes)
        for sync in syncs:
            assert sync.wait(0.0) == -1
            assert sync.agreed() is (turn != 4)
            assert sync.places() == [(7 * rank, turn + rank) for rank in range(3)]
            total = torch.zeros(turn * 8, dtype=torch.int64)
            sync.reduce_inline(total.data_ptr(), total.numel(), 5, 0, 1.0)
            assert torch.equal(total, payloads[0] + payloads[1] + payloads[2])
    full = torch.ones(library.built.INLINE_BYTES + 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="too much inline data"):
        syncs[0].publish(0, 0, 0, full.data_ptr(), full.numel())
    with pytest.raises(ValueError, match="rank outside of the node"):
        ranks.sync(3)


def test_a_page_tells_whose_it_is(node: Any) -> None:
    ranks = node(2)
    wrong_page = library.built.wrong_page
    assert wrong_page(ranks.pages[1], 1, TOKEN) == ""
    assert wrong_page(ranks.pages[1], 0, TOKEN) == "the window of local rank 1"
    assert wrong_page(ranks.pages[1], 1, b"another job's...") == "another job's window"
    at = ranks.pages[1] - ranks.pages[0]
    for offset, why in ((8, "window layout"), (0, "not a commlab window")):
        ranks.memory[at + offset] ^= 0x40
        assert why in wrong_page(ranks.pages[1], 1, TOKEN)
    ranks.memory[at] ^= 0x40
    ranks.memory[at + 8] ^= 0x40
    assert wrong_page(ranks.pages[1], 1, TOKEN) == ""
    with pytest.raises(ValueError, match="16 bytes"):
        library.built.format_page(ranks.pages[0], 0, b"short")
