"""The window of two processes, made by hand: whose memory is opened, what a stranger can do to it, and a peer
that has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from window_pairs import by_hand, closed, pair

from commlab.errors import PeerLostError, SharedMemoryError
from commlab.window import memfd
from commlab.window.exchange import WindowWait
from commlab.window.memory import _CARD, Window

pytestmark = by_hand


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
