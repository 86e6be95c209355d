"""The process that keeps a killed rank's memory until its connections are closed: what it is bound to, and to what it
is not. Ranks are forked from this process, which has torch."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import logging
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from jobs import lives

import commlab
from commlab.errors import PeerLostError
from commlab.job.topology import Topology
from commlab.runtime.group import Group
from commlab.transport.tcp import KEEPER, Links, missing_reason

LIMIT_S = 20.0

pytestmark = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())


class Rank:
    """A forked process that runs ``work(say, *arguments)`` and then waits to be killed; ``say`` writes a line of JSON,
    which ``heard`` returns."""

    def __init__(self, work: Callable[..., None], *arguments: Any):
        self._end, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if not self.pid:
            self._run(work, arguments, writing)
        os.close(writing)
        self._text = b""

    def _run(self, work: Callable[..., None], arguments: tuple[Any, ...], writing: int) -> NoReturn:
        signal.alarm(int(3 * LIMIT_S))
        try:
            work(lambda *said: os.write(writing, json.dumps(said).encode() + b"\n"), *arguments)
            signal.pause()
        except BaseException as error:
            os.write(writing, json.dumps(["error", repr(error)]).encode() + b"\n")
        os._exit(1)

    def heard(self) -> list[Any]:
        while b"\n" not in self._text:
            ready, _, _ = select.select([self._end], [], [], LIMIT_S)
            found = os.read(self._end, 65536) if ready else b""
            assert found, "the rank says nothing"
            self._text += found
        line, _, self._text = self._text.partition(b"\n")
        said: list[Any] = json.loads(line)
        assert said[:1] != ["error"], said
        return said

    def end(self, number: int = signal.SIGKILL) -> None:
        if self.pid:
            os.kill(self.pid, number)
            os.waitpid(self.pid, 0)
            self.pid = 0
            os.close(self._end)


@pytest.fixture
def ranks() -> Iterator[Callable[..., Rank]]:
    made: list[Rank] = []

    def make(*arguments: Any) -> Rank:
        made.append(Rank(*arguments))
        return made[-1]

    yield make
    for rank in made:
        with suppress(OSError):
            rank.end()


def gone(pid: int) -> bool:
    """Whether the process ends soon."""
    stop_s = time.monotonic() + LIMIT_S
    while lives(pid) and time.monotonic() < stop_s:
        time.sleep(1e-3)
    return not lives(pid)


def alone() -> tuple[Links, socket.socket]:
    """Links of a rank whose only peer is a socket."""
    end, peer = socket.socketpair()
    return Links(0, [-1, end.detach()]), peer


def in_the_middle(say: Callable[..., object], rank: int, descriptors: list[list[int]], tensor: torch.Tensor) -> None:
    """One of some ranks, each on a node of its own, that reduce without an end."""
    for owner, mine in enumerate(descriptors):
        for descriptor in mine if owner != rank else ():
            if descriptor >= 0:
                os.close(descriptor)
    links = Links(rank, descriptors[rank])
    group = Group(links.world(), Topology(tuple((each,) for each in range(len(descriptors)))), LIMIT_S)
    say(links.engine.keeper())
    try:
        while True:
            commlab.allreduce(tensor, "max", algorithm="ring", group=group)
            say("reduced")
    except PeerLostError as error:
        say("lost", str(error))


def test_all_others_name_a_rank_that_is_killed_and_nothing_is_left(ranks: Callable[..., Rank]) -> None:
    """Kind: kill -9 of one of 4 ranks in the middle of 25 MB: all others raise, naming it. (How fast is measured by
    bench.death; no timing decides a test.) Nobody's keeper is left."""
    size, victim = 4, 2
    descriptors = [[-1] * size for _ in range(size)]
    for one in range(size):
        for other in range(one):
            ends = socket.socketpair()
            descriptors[one][other], descriptors[other][one] = (end.detach() for end in ends)
    tensor = torch.ones(6_553_600)
    made = [ranks(in_the_middle, rank, descriptors, tensor) for rank in range(size)]
    for descriptor in itertools.chain(*descriptors):
        if descriptor >= 0:
            os.close(descriptor)
    keepers = [rank.heard()[0] for rank in made]
    for rank, keeper in zip(made, keepers, strict=True):
        assert rank.heard() == ["reduced"]
        assert Path(f"/proc/{keeper}/comm").read_text() == "commlab keeper\n"
    made[victim].end()
    for number, rank in enumerate(made):
        if number == victim:
            continue
        while (said := rank.heard()) == ["reduced"]:
            pass
        assert said[0] == "lost" and f"rank {number}: the links lost rank {victim}" in said[1]
    assert gone(keepers[victim])
    assert all(lives(keeper) for number, keeper in enumerate(keepers) if number != victim)
    for rank in made:
        rank.end()
    assert all(gone(keeper) for keeper in keepers)


def stay(say: Callable[..., object], ending: str) -> None:
    links, peer = alone()
    say(links.engine.keeper())
    if ending == "leave":
        links.engine.leave(0.1)
    elif ending == "dropped":
        del links
        gc.collect()
    elif ending == "exit":
        os._exit(0)
    elif ending == "exec":
        os.execv(sys.executable, [sys.executable, "-S", "-E", "-c", "import time; time.sleep(60)"])
    elif ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif ending == "stopped keeper":
        os.kill(links.engine.keeper(), signal.SIGSTOP)
        links.engine.leave(0.1)
    del peer
    say("through")


@pytest.mark.parametrize("ending", ["leave", "dropped", "exit", "exec", "kill", "stopped keeper"])
def test_a_keeper_ends_with_its_rank(ranks: Callable[..., Rank], ending: str) -> None:
    """Kind: no leftover process, however a rank ends; not even a zombie where the rank goes on."""
    rank = ranks(stay, ending)
    (keeper,) = rank.heard()
    if ending in ("leave", "dropped", "stopped keeper"):
        assert rank.heard() == ["through"]
        assert not Path(f"/proc/{keeper}").exists()
    assert gone(keeper)
    assert lives(rank.pid) == (ending not in ("exit", "kill"))


def be_a_parent(say: Callable[..., object]) -> None:
    told: list[int] = []
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: told.append(number))
    os.setpgid(0, 0)
    links, peer = alone()
    keeper = links.engine.keeper()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.killpg(0, number)
        os.kill(keeper, number)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, 0)
    subprocess.run(["true"], check=True)
    assert told == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD]
    assert lives(keeper)
    assert len(os.listdir(f"/proc/{keeper}/fd")) == 2
    links.engine.leave(0.1)
    assert told == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD]
    assert not Path(f"/proc/{keeper}").exists()
    del peer
    say("through")


def test_the_rank_never_meets_its_keeper(ranks: Callable[..., Rank]) -> None:
    """Kind: os.wait(), SIGCHLD and signals to the process group, as by Ctrl-C, are the user's; the keeper outlives
    them, and has no descriptor of the rank's."""
    assert ranks(be_a_parent).heard() == ["through"]


def have_a_child(say: Callable[..., object], how: str) -> None:
    links, peer = alone()
    say(links.engine.keeper())
    fork = os.fork if how == "fork" else ctypes.PyDLL(None)._Fork
    child = fork()
    if not child:
        # The parent's keeper is not its own.
        say(os.getpid(), links.engine.keeper())
        time.sleep(LIMIT_S)
        os._exit(0)
    del peer


@pytest.mark.parametrize("how", ["fork", "_Fork"])
def test_a_child_of_the_rank_does_not_hold_the_keeper(ranks: Callable[..., Rank], how: str) -> None:
    """Kind: a data loader's worker that outlives its rank; and one that was forked without libc's knowledge."""
    if how == "_Fork" and not hasattr(ctypes.CDLL(None), "_Fork"):
        pytest.skip("an older libc")
    rank = ranks(have_a_child, how)
    (keeper,) = rank.heard()
    child, childs_keeper = rank.heard()
    assert childs_keeper == 0
    try:
        assert lives(keeper)
        rank.end()
        assert gone(keeper)
        assert lives(child)
    finally:
        os.kill(child, signal.SIGKILL)


def be_refused(say: Callable[..., object], call: int) -> None:
    """A filter as a container may have: the call fails with EPERM."""
    load, equal, answer, permitted, refused = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050001
    lines = ((load, 0, 0, 0), (equal, 0, 1, call), (answer, 0, 0, refused), (answer, 0, 0, permitted))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    argument = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(program))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(38, 1, 0, 0, 0) == 0
    assert prctl(22, 2, argument, 0, 0) == 0, os.strerror(ctypes.get_errno())
    links, peer = alone()
    say(links.engine.keeper())
    links.engine.leave(0.1)
    assert len(peer.recv(64)) == 16
    say("through")


@pytest.mark.parametrize("call", ["clone", "close_range", "pidfd_open"])
def test_without_a_keeper_everything_is_as_before(ranks: Callable[..., Rank], call: str) -> None:
    """Kind: a container, or an older kernel, that refuses what a keeper needs."""
    numbers = {"clone": 220 if platform.machine() == "aarch64" else 56, "close_range": 436, "pidfd_open": 434}
    rank = ranks(be_refused, numbers[call])
    assert rank.heard() == [0]
    assert rank.heard() == ["through"]


def test_one_keeper_for_all_links_of_a_process_and_none_where_it_is_turned_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Kind: several groups of links in a process; a scheduler that adds up memory."""
    (first, one), (second, two) = alone(), alone()
    assert first.engine.keeper() == second.engine.keeper() > 0
    keeper = first.engine.keeper()
    first.engine.leave(0.0)
    assert lives(keeper)
    second.engine.leave(0.0)
    assert not Path(f"/proc/{keeper}").exists()
    monkeypatch.setenv(KEEPER, "off")
    third, three = alone()
    assert third.engine.keeper() == 0
    monkeypatch.setenv(KEEPER, "of")
    with caplog.at_level(logging.WARNING, "commlab"):
        fourth, four = alone()
    for links in (third, fourth):
        links.engine.leave(0.0)
    for peer in (one, two, three, four):
        peer.close()
    assert "COMMLAB_KEEPER='of' means nothing" in caplog.text
