"""Who has left, and how: watches of several ranks in one process, without torch or MPI, and how real processes end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

import commlab
from commlab.job.leaving import status_words
from commlab.job.watch import Watch, meet

SOON_S = 5.0
"""How long news may take on a busy machine; 1 s is what is promised."""


def soon(condition: Callable[[], object]) -> bool:
    stop_s = time.monotonic() + SOON_S
    while not condition() and time.monotonic() < stop_s:
        time.sleep(1e-3)
    return bool(condition())


def watches(nodes: Sequence[Sequence[int]]) -> list[Watch]:
    """All ranks' watches, each made in a thread of its own, as by ranks that gather over a transport."""
    size = sum(map(len, nodes))
    barrier, table = threading.Barrier(size), [b""] * size
    made: list[Watch | None] = [None] * size
    reasons: list[str] = []

    def rank_of(rank: int) -> None:
        def gather(data: bytes, name: str) -> list[bytes]:
            table[rank] = data
            barrier.wait(SOON_S)
            everything = list(table)
            barrier.wait(SOON_S)
            return everything

        made[rank], found = meet(rank, nodes, lambda: "127.0.0.1", gather)
        reasons.extend(found)

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON_S)
    assert not reasons
    return [watch for watch in made if watch is not None]


@pytest.mark.parametrize("nodes", [((0, 1, 2),), ((0, 1), (2, 3), (4,)), ((0,), (1,)), ((2, 0), (1, 3))])
def test_all_hear_how_a_rank_leaves(nodes: Sequence[Sequence[int]]) -> None:
    """B1: each rank in turn says its exit code; those that are left hear it, on every host."""
    nodes = tuple(tuple(sorted(node)) for node in sorted(map(sorted, nodes)))
    for leaver in range(sum(map(len, nodes))):
        ranks = watches(nodes)
        assert not any(watch.departed(rank) for watch in ranks for rank in range(len(ranks)))
        ranks[leaver].leave("exit code 3")
        for watch in ranks:
            if watch.rank != leaver:
                assert soon(partial(watch.departed, leaver))
                assert watch.departed(leaver) == "left (exit code 3)"
                assert [rank for rank in range(len(ranks)) if watch.departed(rank)] == [leaver]
        for watch in ranks:
            watch.close()


def test_an_end_in_good_order_is_no_news() -> None:
    """B1: ranks that close one after the other, the first one first, raise no false alarm."""
    for order in ((0, 1, 2, 3), (3, 1, 2, 0)):
        ranks = watches(((0, 1), (2, 3)))
        for rank in order:
            ranks[rank].close()
            time.sleep(0.01)
        assert not any(watch.departed(rank) for watch in ranks for rank in range(4))


def test_a_connection_that_ends_is_a_rank_that_is_gone() -> None:
    """B1: os._exit and kill -9 say nothing; the kernel does. Here the process lives, so no exit code is named."""
    ranks = watches(((0, 1, 2),))
    link = next(iter(ranks[2]._links.values()))
    link.socket.shutdown(socket.SHUT_RDWR)
    for watch in ranks[:2]:
        assert soon(partial(watch.departed, 2))
        assert watch.departed(2) == "is gone: its process ended"
    for watch in ranks:
        watch.close()


def test_callbacks_and_children_of_fork() -> None:
    """B1: a child of fork (a DataLoader's worker) does not keep its parent's connections alive."""
    first, second = Watch(0), Watch(1)
    card = first.listen(local=True, remote_host="")
    first.start(1)
    assert second.join(0, card, local=True) == ""
    assert soon(lambda: first._links)
    told = threading.Event()
    first.calls.append(told.set)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        time.sleep(60)
        os._exit(0)
    try:
        # What the kernel does with the descriptors of a process that ends.
        next(iter(second._links.values())).socket.close()
        assert told.wait(SOON_S)
        assert first.departed(1) == "is gone: its process ended"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        first.close()


def test_strangers_are_sent_away() -> None:
    """B1: whoever connects without the token is no rank."""
    watch = Watch(0)
    card = watch.listen(local=True, remote_host="")
    watch.start(1)
    for words in (b"hello\n", b'{"hello": 1, "token": "wrong", "pid": 0}\n', b""):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
            stranger.connect(f"\0{card['local']}")
            stranger.sendall(words)
    honest = Watch(1)
    assert honest.join(0, card, local=True) == ""
    honest.start(0)
    assert soon(lambda: watch._links)
    assert len(watch._links) == 1
    honest.leave("exit code 0")
    assert soon(lambda: watch.departed(1) == "left (exit code 0)")
    for each in (honest, watch):
        each.close()


ENDS = {
    "sys.exit(3)": "exit code 3",
    "sys.exit()": "exit code 0",
    "sys.exit('no such file')": "exit code 1: no such file",
    "raise SystemExit(3)": "",
    "raise ValueError('seven')": "exit code 1: ValueError: seven",
    "pass": "exit code 0",
    "try: sys.exit(3)\nexcept SystemExit: pass": "exit code 0",
    "def main():\n    return 4\nsys.exit(main())": "exit code 4",
    "sys.excepthook = lambda *details: None\nraise ValueError('seven')": "exit code 1: ValueError: seven",
}


def test_how_programs_end(tmp_path: Path) -> None:
    """B1: what atexit can know of the exit code: right or nothing."""
    head = (
        "import atexit, os, sys\nfrom commlab.job import leaving\nleaving.observe()\n"
        "atexit.register(lambda: os.write(1, leaving.exit_words().encode()))\n"
    )
    running = {}
    for number, (end, _) in enumerate(ENDS.items()):
        program = tmp_path / f"program{number}.py"
        program.write_text(head + end + "\n")
        running[end] = subprocess.Popen(
            [sys.executable, str(program)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(Path(commlab.__file__).parents[1])},
        )
    for end, process in running.items():
        said, _ = process.communicate(timeout=60)
        assert said.decode() == ENDS[end], end


def test_words_for_a_status() -> None:
    assert status_words(3 << 8) == "exit code 3"
    assert status_words(signal.SIGKILL) == "killed by signal 9, SIGKILL"
    assert status_words(0) == "exit code 0"
