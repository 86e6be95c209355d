"""The window of two processes, made by hand: what is refused, memory given out and back, and what is left behind."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import needs_native

from commlab.errors import PeerLostError, SharedMemoryError
from commlab.window import area, memfd
from commlab.window.area import Place
from commlab.window.exchange import WindowWait
from commlab.window.memory import _CARD, Window, size_class

pytestmark = [
    pytest.mark.usefixtures("small_heap"),
    needs_native,
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the window needs Linux"),
]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    """Parts of windows that this process has mapped."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:commlab")


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = descriptors(), mappings()
    yield
    gc.collect()
    assert (descriptors(), mappings()) == before


def pair() -> tuple[Window, Window]:
    """Both ranks of a node in one process: each opens the other's part as any process would."""
    windows = Window(0, 2), Window(1, 2)
    cards = [window.card() for window in windows]
    for window in windows:
        window.open(cards, 0.0)
    for window in windows:
        window.make_staging()
    return windows


def closed(*windows: Window) -> None:
    for window in windows:
        window.close()


def test_ranks_see_each_others_memory() -> None:
    first, second = pair()
    for size_bytes in (1, 64, 1000, 2**20, 9 * 2**20 + 5):
        mine, place = first.allocate(size_bytes)
        assert (mine.numel(), mine.data_ptr() % 64, int(mine.sum())) == (size_bytes, 0, 0)
        assert first.locate(mine) == place
        theirs = second.view(0, place, size_bytes)
        mine[-1] = 7
        assert theirs[-1] == 7
        theirs[0] = 9
        assert mine[0] == 9
        assert first.view(0, place, size_bytes).data_ptr() == mine.data_ptr()
        assert theirs.data_ptr() == second.address(0, place) != mine.data_ptr()
    closed(first, second)


def test_where_tensors_lie() -> None:
    first, second = pair()
    memory, place = first.allocate(4096)
    other, _ = first.allocate(4096)
    numbers = memory.view(torch.float32)
    assert first.locate(numbers[3:10]) == Place(place.segment, place.offset + 12)
    assert first.locate(numbers.view(32, 32)) == place
    assert first.locate(other) != place
    assert first.locate(torch.ones(5)) is None
    assert first.locate(torch.empty(0)) is None
    assert second.locate(memory) is None, "another rank's memory is not this one's"
    assert first.locate(second.view(0, place, 4)) is None
    closed(first, second)


def test_memory_is_reused() -> None:
    first, second = pair()
    places = []
    for turn in range(10):
        for size_bytes in (1000, 6 * 2**20, 12 * 2**20):
            memory, place = first.allocate(size_bytes)
            assert not memory.any(), "memory that was used before is zeroed again"
            memory.fill_(turn + 1)
            assert (second.view(0, place, size_bytes) == turn + 1).all(), "the peer sees the place's new content"
            places.append(place)
            first.free(memory)
    assert len(set(places)) == 3
    kept = [first.allocate(1000) for _ in range(2)]
    assert kept[0][1] == places[0] != kept[1][1]
    closed(first, second)


def test_sizes_that_vary_find_what_was_freed() -> None:
    """An ordinary tensor of another length in every call takes no segment of its own."""
    first, second = pair()
    places = set()
    for turn in range(60):
        size_bytes = 9 * 2**20 + 131071 * (turn * 37 % 60)
        assert size_bytes <= size_class(size_bytes) <= 1.125 * size_bytes
        memory, place = first.allocate(size_class(size_bytes))
        assert not memory[:: 2**16].any()
        memory.fill_(turn + 1)
        places.add(place)
        first.free(memory)
    assert len(places) <= 9, "8 sizes for each power of two"
    closed(first, second)


def test_many_small_tensors_share_segments() -> None:
    first, second = pair()
    before = descriptors()
    given = [first.allocate(100)[1] for _ in range(5000)]
    assert len(set(given)) == 5000
    assert len({place.segment for place in given}) == 1
    assert descriptors() == before + 1, "for the peers to open; a mapping holds none"
    closed(first, second)


def test_tensors_outlive_their_window() -> None:
    first, second = pair()
    mine, place = first.allocate(5000)
    theirs = second.view(0, place, 5000)
    mine.fill_(5)
    closed(first, second)
    closed(first)
    del first, second
    # The same memory, mapped twice: by its owner and by the peer.
    assert mappings() == 2
    theirs[17] = 6
    assert (int(mine[17]), int(mine.sum())) == (6, 5 * 5000 + 1)
    part = mine[10:20].clone()
    del mine
    assert mappings() == 1
    assert int(theirs[17]) == 6
    del theirs
    assert part.sum() == 51


def test_a_forgotten_window_leaves_nothing() -> None:
    pair()[0].allocate(100)


def test_a_part_cannot_be_opened_once_it_is_closed() -> None:
    first, second = pair()
    _, place = first.allocate(100)
    closed(first)
    with pytest.raises(
        SharedMemoryError, match=f"cannot open segment {place.segment} of local rank 0 of process {os.getpid()}"
    ):
        second.view(0, place, 100)
    closed(second)


Card = tuple[int, int, int, bytes]

WRONG: dict[str, tuple[Callable[[Card, Window], Card], str]] = {
    "a stranger's token": (lambda card, _: (*card[:3], b"x" * 16), "shows another job's window: ranks of one host in"),
    "no process": (
        lambda card, _: (2**22 + 1, *card[1:]),
        "cannot open the control page of local rank 1 of process 4194305",
    ),
    "no descriptor": (lambda card, _: (card[0], 999_999, *card[2:]), "cannot open .*: No such file"),
    "another rank's": (lambda card, third: _CARD.unpack(third.card()), "shows the window of local rank 2"),
    "a file of another size": (lambda card, _: (card[0], 0, *card[2:]), "cannot open|is .*, and no memory of commlab"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_page_that_is_not_the_peers_is_refused(case: str, tmp_path: Path) -> None:
    doctored, message = WRONG[case]
    first, second, third = Window(0, 3), Window(1, 3), Window(2, 3)
    stranger = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(stranger, b"not a window")
    card = doctored(_CARD.unpack(second.card()), third)
    if case == "a file of another size":
        card = (card[0], stranger, *card[2:])
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(SharedMemoryError, match=message):
        first.open([first.card(), _CARD.pack(*card), third.card()], 0.0)
    assert (tmp_path / "file").read_bytes() == before
    os.close(stranger)
    closed(first, second, third)


def test_a_strangers_memory_of_the_right_size_is_not_written() -> None:
    first, second = Window(0, 2), Window(1, 2)
    size_bytes = first._native.CONTROL_BYTES
    stranger = os.memfd_create("stranger", os.MFD_CLOEXEC)
    content = bytes(range(256)) * (size_bytes // 256)
    os.write(stranger, content.ljust(size_bytes, b"."))
    card = _CARD.unpack(second.card())
    with pytest.raises(SharedMemoryError, match="no memory of commlab"):
        first.open([first.card(), _CARD.pack(card[0], stranger, *card[2:])], 0.0)
    assert os.pread(stranger, size_bytes, 0) == content.ljust(size_bytes, b".")
    os.close(stranger)
    closed(first, second)


def test_missing_memory_is_an_error_and_no_sigbus(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair()

    def full(fd: int, offset: int, size_bytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        before = descriptors()
        with pytest.raises(SharedMemoryError, match="no 9 MiB of shared memory for segment 1: No space left on device"):
            first.allocate(9 * 2**20)
        with pytest.raises(SharedMemoryError, match="for control page"):
            Window(0, 2)
        assert descriptors() == before

    def none_left(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(os, "memfd_create", none_left)
        with pytest.raises(SharedMemoryError, match="no 0 MiB of shared memory for control page: Too many open files"):
            Window(0, 2)
    with monkeypatch.context() as patched:
        patched.setattr(memfd, "available_memory", lambda: (8 * 2**20, ""))
        with pytest.raises(SharedMemoryError, match="no 9 MiB of shared memory for segment 1: 8 MiB are left"):
            first.allocate(9 * 2**20)
    assert first.allocate(9 * 2**20)[0].numel() == 9 * 2**20, "and it can be had later"
    closed(first, second)


def test_there_is_an_end_to_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair()
    monkeypatch.setattr(area, "_ARENA_BYTES", 4096)
    monkeypatch.setattr(first.area, "_most", 8)
    for _ in range(7):
        first.allocate(4096)
    with pytest.raises(SharedMemoryError, match="8 segments, the most there can be; ask for fewer, larger tensors"):
        first.allocate(4096)
    closed(first, second)


def test_a_peer_that_has_ended_is_named() -> None:
    """Another process: alive, then dead and not yet waited for, then gone."""
    here_from_there, there_to_here = os.pipe()
    here = Window(0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        try:
            there = Window(1, 2)
            os.write(there_to_here, there.card())
            there.open([_from_parent(here), there.card()], 0.0)
            there.sync.arrive()
            os.write(there_to_here, b"r")
            signal.pause()
        finally:
            os._exit(1)
    try:
        here.open([here.card(), os.read(here_from_there, _CARD.size)], 0.0)
        assert os.read(here_from_there, 1) == b"r"
        wait: Any = WindowWait(here)
        here.sync.arrive()
        assert wait.test()
        assert wait.peers() == ()
        here.sync.arrive()
        assert not wait.test()
        assert tuple(wait.peers()) == (1,)
        assert here.alive(1)
        wait.block(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert not here.alive(1), "a zombie does not come back"
        with pytest.raises(PeerLostError, match="rank 1 is gone: its process ended while its peers waited for it"):
            wait.block(0.01)
        os.waitpid(pid, 0)
        assert not here.alive(1)
        with pytest.raises(PeerLostError):
            wait.block(0.01)
    finally:
        # Reaped already, unless an assertion has failed.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(here_from_there)
        os.close(there_to_here)
        here.close()


def _from_parent(window: Window) -> bytes:
    """The parent's card as the child must see it: with the parent's process."""
    return _CARD.pack(os.getppid(), *_CARD.unpack(window.card())[1:])


def test_what_is_dropped_is_given_back() -> None:
    """B9: 12 tensors, dropped one after the other, leave no segment, descriptor or mapping; so do small ones, and a
    view keeps the memory."""
    first, second = pair()
    before = descriptors(), mappings()
    for turn in range(12):
        for size_bytes in (9 * 2**20, 7 * 2**20, 1000):
            tensor, place = first.allocate(size_bytes, kept=False)
            assert not tensor.any(), "zeroed, whatever lay there before"
            tensor.fill_(turn + 1)
            assert int(second.view(0, place, size_bytes)[-1]) == turn + 1
            del tensor
        second.let_go()
        gc.collect()
        assert descriptors() <= before[0] + 1, "but for the arena of small tensors"
        assert mappings() <= before[1] + 2
    tensor, place = first.allocate(9 * 2**20, kept=False)
    part = tensor[5:10].view(5, 1)
    del tensor
    assert first.locate(part) == Place(place.segment, place.offset + 5)
    del part
    assert place.segment not in first.area.segments
    closed(first, second)


def test_a_number_never_names_other_memory() -> None:
    """B9: a peer that has the old memory mapped does not take it for the new one in the same place of the table."""
    first, second = pair()
    seen = set()
    for turn in range(5):
        tensor, place = first.allocate(9 * 2**20, kept=False)
        tensor.fill_(turn + 1)
        seen.add(place.segment)
        assert int(second.view(0, place, 10)[3]) == turn + 1
        del tensor
        second.let_go()
        with pytest.raises(SharedMemoryError, match=r"segment \d+ of local rank 0 was given back"):
            second.view(0, place, 10)
    assert len(seen) == 5
    assert len({number % first._native.MAX_SEGMENTS for number in seen}) == 1
    closed(first, second)


def test_dropped_and_freed_once_only() -> None:
    """B9: memory that was freed by hand is not given back again when its tensor goes."""
    first, second = pair()
    tensor, place = first.allocate(5000, kept=False)
    first.free(tensor)
    again, same = first.allocate(5000, kept=False)
    assert same == place
    del tensor
    another, elsewhere = first.allocate(5000, kept=False)
    assert elsewhere != place
    again.fill_(1)
    assert not another.any()
    closed(first, second)


def test_a_child_of_fork_gives_nothing_back() -> None:
    """B9: the memory is the parent's, and the parent goes on with it."""
    first, second = pair()
    tensor, place = first.allocate(9 * 2**20, kept=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        del tensor
        os._exit(0)
    os.waitpid(pid, 0)
    assert first.sync.segment(0, place.segment)[1] == 9 * 2**20
    closed(first, second)


def test_tensors_that_are_saved_own_their_memory() -> None:
    """B8: two tensors of one segment, each with a storage of its own size."""
    first, second = pair()
    for size_bytes in (296, 12 * 2**20):
        tensor, place = first.allocate(size_bytes)
        assert tensor.untyped_storage().nbytes() == size_bytes
        assert second.view(0, place, size_bytes).untyped_storage().nbytes() == size_bytes
    closed(first, second)


def test_nobody_can_cut_memory_off() -> None:
    """B11: not through the descriptor, nor through /proc."""
    first, second = pair()
    _, place = first.allocate(9 * 2**20)
    for fd in (first._control_fd, first.sync.segment(0, place.segment)[0]):
        size_bytes = os.fstat(fd).st_size
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        with contextlib.suppress(PermissionError), open(f"/proc/{os.getpid()}/fd/{fd}", "r+b") as again:
            os.ftruncate(again.fileno(), 2 * size_bytes)
        assert os.fstat(fd).st_size == size_bytes
    closed(first, second)


def test_a_strangers_descriptor_is_not_opened(tmp_path: Path) -> None:
    """B11: a pipe, which would wait for its other end, a file, and memory that is not sealed or another window's."""
    first, second = pair()
    size_bytes = first._native.CONTROL_BYTES
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    unsealed = os.memfd_create("commlab x control page", os.MFD_CLOEXEC)
    os.ftruncate(unsealed, size_bytes)
    strangers = {
        os.open(pipe, os.O_RDWR): "no memory of commlab",
        os.open("/dev/zero", os.O_RDWR): "no memory of commlab",
        unsealed: "can still change its size",
    }
    for fd, message in strangers.items():
        with pytest.raises(SharedMemoryError, match=message):
            memfd.opened(os.getpid(), fd, size_bytes, "it")
        os.close(fd)
    with pytest.raises(SharedMemoryError, match="another window's memory"):
        memfd.opened(os.getpid(), second._control_fd, size_bytes, "it", "0123456789abcdef ")
    closed(first, second)


def test_more_ranks_than_a_window_has_room_for() -> None:
    """B10: refused before anything is made, with the way out."""
    with pytest.raises(SharedMemoryError, match="a window has room for 512 ranks, and this node has 513; launch fewer"):
        Window(0, 513)
