"""Who has left: every rank hears within a moment of each rank that ends, however it ends.

A connection ends with its process. So each rank keeps one to the first rank of its host (a local socket without a name
in any file system), and the first ranks of all hosts one to rank 0 (TCP). Before a rank ends it says how, as long as
the interpreter lets it; otherwise the connection's end says that it is gone, and the kernel, on the same host, how.
Whoever learns of it passes it on. Nothing is sent while everybody lives. A thread of each rank, asleep in the kernel,
listens.

To have left is no error: a rank may be through before the others. It becomes one where somebody waits for that rank.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from .leaving import status_words

CONNECT_S = 5.0
"""How long a rank tries to reach the one that it reports to."""

_DYING_S = 0.1
"""How long a process may take between closing its connections and having ended."""
_LINE_BYTES = 4096
_watches: WeakSet[Watch] = WeakSet()


class _Link:
    """A connection to ``rank``; ``pid``: its process, where it is one of this host, else 0."""

    __slots__ = ("announced", "pid", "rank", "received", "socket")

    def __init__(self, connection: socket.socket, rank: int, pid: int):
        self.socket, self.rank, self.pid = connection, rank, pid
        self.received = b""
        self.announced = False
        """Whether the rank has said that it leaves."""


class Watch:
    """What this rank knows of the others. Ranks are the job's."""

    def __init__(self, rank: int):
        self.rank = rank
        self._gone: dict[int, tuple[str, float]] = {}
        self._links: dict[int, _Link] = {}
        """By descriptor."""
        self._listeners: dict[int, tuple[socket.socket, str]] = {}
        """By descriptor: who listens for peers, and the token that they must show."""
        self._expected = 0
        self._met = threading.Event()
        """Set once all ranks report to this one that are to."""
        self._pids: dict[int, int] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._through = False
        """Whether this rank closes: that others do is no news any more, and their last words may be lost."""
        self._thread: threading.Thread | None = None
        self.calls: list[Callable[[], None]] = []
        """Called by the thread whenever a rank is known to have left."""
        _watches.add(self)

    def departed(self, rank: int) -> str:
        """How ``rank`` has left (``left (exit code 3)``); empty while it is there, as far as is known."""
        return self._gone[rank][0] if rank in self._gone else ""

    def departed_for_s(self, rank: int) -> float:
        """How long this has been known, in seconds."""
        return time.perf_counter() - self._gone[rank][1] if rank in self._gone else 0.0

    # Meeting.

    def listen(self, local: bool, remote_host: str) -> dict[str, Any]:
        """Be one that others report to: ranks of this host (``local``), or of other hosts, at the address
        ``remote_host`` of this one where it is not empty. Returns the card by which they find this rank."""
        card: dict[str, Any] = {"pid": os.getpid(), "token": secrets.token_hex(16)}
        with suppress(OSError):
            if local:
                # In the kernel's own name space: nothing to clean up. The name is random, and the token is asked for.
                name = f"commlab-{secrets.token_hex(8)}"
                self._listen_at(socket.AF_UNIX, f"\0{name}", card["token"])
                card["local"] = name
        with suppress(OSError):
            if remote_host:
                card["remote"] = [remote_host, self._listen_at(socket.AF_INET, (remote_host, 0), card["token"])]
        return card

    def _listen_at(self, family: int, address: Any, token: str) -> int:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind(address)
            listener.listen(4096)
        except OSError:
            listener.close()
            raise
        self._listeners[listener.fileno()] = listener, token
        return int(listener.getsockname()[1]) if family == socket.AF_INET else 0

    def join(self, rank: int, card: dict[str, Any], local: bool) -> str:
        """Report to ``rank``, whose card this is. Returns why that is not possible; empty: it is done."""
        try:
            if local:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.settimeout(CONNECT_S)
                connection.connect(f"\0{card['local']}")
            else:
                connection = socket.create_connection(tuple(card["remote"]), CONNECT_S)
            connection.settimeout(None)
            connection.sendall(_line(hello=self.rank, token=card["token"], pid=os.getpid() if local else 0))
        except (OSError, KeyError) as error:
            return f"rank {self.rank} does not reach rank {rank}: {error!r}"
        self._links[connection.fileno()] = _Link(connection, rank, card["pid"] if local else 0)
        return ""

    def start(self, expected: int) -> None:
        """Listen from now on, until ``expected`` ranks report to this one, and to all of them."""
        self._expected = expected
        if expected <= 0:
            self._met.set()
        if self._links or self._listeners:
            self._thread = threading.Thread(target=self._run, name="commlab watch", daemon=True)
            self._thread.start()

    # The thread.

    def _run(self) -> None:
        while not self._closed and (self._links or self._listeners):
            poll = select.poll()
            for descriptor in (*self._links, *self._listeners):
                poll.register(descriptor, select.POLLIN)
            for descriptor, _ in poll.poll():
                if descriptor in self._listeners:
                    self._accept(descriptor)
                elif descriptor in self._links:
                    self._read(self._links[descriptor])
        with self._lock:
            self._drop_all()

    def _accept(self, descriptor: int) -> None:
        listener, token = self._listeners[descriptor]
        try:
            connection, _ = listener.accept()
        except OSError:
            time.sleep(0.1)  # no descriptor is left, at the moment; the peer waits in the listener's queue
            return
        connection.settimeout(CONNECT_S)
        try:
            # The hello was sent right after connecting; a stranger who says nothing is not waited for again.
            said = b""
            while b"\n" not in said and (data := connection.recv(_LINE_BYTES)):
                said += data
            line, _, rest = said.partition(b"\n")
            hello = json.loads(line)
            if not secrets.compare_digest(str(hello["token"]), token):
                raise ValueError
            link = _Link(connection, int(hello["hello"]), int(hello["pid"]))
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()
            return
        connection.settimeout(None)
        self._links[connection.fileno()] = link
        self._expected -= 1
        self._take(link, rest)
        for rank, (how, _) in self._gone.copy().items():
            self._send(link, _line(rank=rank, how=how))
        if self._expected <= 0:
            self._met.set()
            for other, _ in self._listeners.values():
                other.close()
            self._listeners.clear()

    def _read(self, link: _Link) -> None:
        try:
            data = link.socket.recv(_LINE_BYTES)
        except OSError:
            data = b""
        if not data:
            self._drop(link)
            if not (link.announced or self._through):
                how = _kernel_words(link.pid) if link.pid else ""
                verb = "left" if how.startswith("exit code") else "is gone"
                self._learn(link.rank, f"{verb} ({how})" if how else "is gone: its process ended", link)
            return
        self._take(link, data)

    def _take(self, link: _Link, data: bytes) -> None:
        *lines, link.received = (link.received + data).split(b"\n")
        for line in lines:
            try:
                said = json.loads(line)
                rank, how = int(said["rank"]), str(said["how"])
            except (ValueError, KeyError, TypeError):
                continue
            link.announced = link.announced or rank == link.rank
            if how:
                self._learn(rank, how, link)

    def _learn(self, rank: int, how: str, source: _Link) -> None:
        if rank in self._gone:
            return
        self._gone[rank] = how, time.perf_counter()
        for link in list(self._links.values()):
            if link is not source:
                self._send(link, _line(rank=rank, how=how))
        for call in list(self.calls):
            call()

    def _send(self, link: _Link, line: bytes) -> None:
        # A few hundred bytes into an empty buffer: nobody waits here.
        with suppress(OSError), self._lock:
            link.socket.sendall(line, socket.MSG_DONTWAIT)

    def _drop(self, link: _Link) -> None:
        self._links.pop(link.socket.fileno(), None)
        link.socket.close()

    def _drop_all(self) -> None:
        for link in list(self._links.values()):
            self._drop(link)
        for listener, _ in self._listeners.values():
            listener.close()
        self._listeners.clear()

    # The end.

    def leave(self, words: str) -> None:
        """Tell the others that this rank leaves, and how (``exit code 3``; empty: not known). For ``atexit``."""
        how = f"left ({words})" if words else "left (with an exit code that is not known)"
        for link in list(self._links.values()):
            self._send(link, _line(rank=self.rank, how=how))

    def close(self) -> None:
        """End the watch in good order: nobody hears that this rank is gone. Call this once all ranks are through with
        each other."""
        if self._closed:
            return
        self._through = True
        for link in list(self._links.values()):
            self._send(link, _line(rank=self.rank, how=""))
        self._closed = True
        for link in list(self._links.values()):
            with suppress(OSError):
                link.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        for listener, _ in list(self._listeners.values()):
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def _abandon(self) -> None:
        """In a child of fork: the connections are the parent's, and must end with it."""
        self._closed = self._through = True
        self._thread, self._lock = None, threading.Lock()
        self._drop_all()


def meet(
    rank: int,
    nodes: Sequence[Sequence[int]],
    host: Callable[[], str],
    gather: Callable[[bytes, str], list[bytes]],
) -> tuple[Watch, list[str]]:
    """The watch of this rank, and why it does not see some of the others (no reasons: it sees all). ``nodes``: the
    ranks of each host, in order; ``host()``: the address under which other hosts reach this one; ``gather(data,
    name)``: every rank's data on every rank. Collective."""
    watch = Watch(rank)
    mine = next(node for node in nodes if rank in node)
    first = rank == mine[0]
    others = len(nodes) - 1 if rank == nodes[0][0] else 0
    card: dict[str, Any] = {}
    if first:
        card = watch.listen(len(mine) > 1, host() if others else "")
    cards = [json.loads(said) for said in gather(json.dumps(card).encode(), "cards of the watch")]
    reason = ""
    if not first:
        reason = watch.join(mine[0], cards[mine[0]], local=True)
    elif rank != nodes[0][0]:
        reason = watch.join(nodes[0][0], cards[nodes[0][0]], local=False)
    watch.start((len(mine) - 1 if first else 0) + others)
    reasons = [said.decode(errors="replace") for said in gather(reason.encode(), "reasons against a watch")]
    if not any(reasons):
        # All have connected. A rank that left before its thread took them in would tell them nothing.
        watch._met.wait(CONNECT_S)
    return watch, [said for said in reasons if said]


def _line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def _kernel_words(pid: int) -> str:
    """How the process ``pid`` has ended; empty where its parent has taken the status already."""
    stop_s = time.monotonic() + _DYING_S
    while time.monotonic() < stop_s:
        try:
            stat = Path(f"/proc/{pid}/stat")
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] in "ZX":
                # The kernel tells the status, the last field, to processes of the same user only: to others it is zero.
                return status_words(int(fields[-1])) if stat.stat().st_uid == os.geteuid() else ""
        except (OSError, ValueError, IndexError):
            return ""
        time.sleep(1e-3)
    return ""


def _after_fork() -> None:
    for watch in list(_watches):
        watch._abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
