"""A server's loop: it moves messages between a transport and the state machine until all workers have closed."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ... import trace
from ...errors import PeerLostError
from ...runtime.waiting import WARN_AFTER_S, gone_words, pause, spin_s, wait_until
from ...transport.base import Transport
from ..link import Link
from ..messages import TEXT_BYTES, Header, Kind
from .server import Server

log = logging.getLogger("commlab")

_TELL_S = 2.0
_FIRST = -1, 0, 0
_LOOK_AGAIN_S = 1.0
"""So often the server looks for requests that have waited for long."""


class ServerLoop:
    """``workers`` and ``servers``: their ranks in ``transport``. ``crowded``: ranks share cores. ``departed(rank)``:
    how a rank has left, empty while it is there."""

    def __init__(
        self,
        server: Server,
        transport: Transport,
        workers: Sequence[int],
        servers: Sequence[int],
        timeout_s: float,
        crowded: bool,
        departed: Callable[[int], str] = lambda rank: "",
    ):
        self._rank, self._workers, self._departed = transport.rank, tuple(workers), departed
        self.server, self._timeout_s, self._crowded = server, timeout_s, crowded
        self._ledger = server.ledger
        # Servers send each other messages only where they have to agree.
        others = [rank for rank in servers if rank != transport.rank] if self._ledger.rules.agrees else []
        peers = {rank: peer for peer, rank in enumerate((*workers, *servers))}
        self._links = {
            peer: Link(
                transport,
                rank,
                partial(server.memory_for, peer),
                partial(self._arrived, peer),
                partial(server.ready, peer),
            )
            for rank, peer in peers.items()
            if rank in workers or rank in others
        }
        for link in self._links.values():
            link.listen()
        self._others = [peers[rank] for rank in others]
        self._open_servers = set(self._others)
        """Other servers that have not closed."""
        self._sent_close = False
        self._looked_s = self._warned_s = time.perf_counter()
        self._moves = 0
        self.finished = False
        """Whether all workers and all other servers have closed, and every message has left."""

    def run(self) -> None:
        """Serve until all workers have closed. PeerLostError when one of them, or another server, is gone."""
        try:
            wait_until(lambda: self.finished, self)
        except PeerLostError as error:
            ledger = self._ledger
            clocks = ", ".join(
                f"{name} {'has left' if worker.left else f'at clock {worker.clock}'}"
                for name, worker in zip(ledger.names, ledger.workers, strict=True)
            )
            raise PeerLostError(f"server {ledger.index} of {ledger.rules.servers}: {error} ({clocks})") from error
        except Exception as error:
            self._tell(f"{type(error).__name__}: {error}")
            raise

    def _tell(self, reason: str) -> None:
        """Tell the workers why this server answers nothing more; none of them is waited for for long."""
        text = torch.frombuffer(bytearray(reason.encode()[:TEXT_BYTES]), dtype=torch.uint8)
        links = [self._links[peer] for peer in range(self._ledger.rules.workers)]
        for link in links:
            link.send(_FIRST, Header(Kind.ERROR, length=text.numel()), text)
        stop_s = time.perf_counter() + _TELL_S
        with contextlib.suppress(Exception):  # the error that is told is the one that counts
            while not all(link.idle for link in links) and time.perf_counter() < stop_s:
                for link in links:
                    link.poll_sends()

    # What the waiting loop asks (:class:`commlab.runtime.waiting.Waiter`).

    def advance(self) -> int:
        """Go on without waiting; the mark counts the calls in which anything moved."""
        self._moves += self.poll()
        return self._moves

    def rest(self, idle_s: float) -> None:
        """Wait a little for messages, and not at all right after something moved."""
        if idle_s:
            pause(idle_s, spin_s(self._crowded, any(link.moving for link in self._links.values())))

    def gone(self) -> str:
        """The sentence that says which workers have left without close()."""
        workers = zip(self._workers, self._ledger.workers, strict=True)
        awaited = [rank for rank, worker in workers if not worker.left]
        return gone_words(self._rank, awaited, self._departed, lambda: "its loop, waiting for requests or close()")

    def silence(self, idle_s: float) -> str:
        """Nobody owes a server anything: it waits for requests as long as there are workers."""
        return ""

    # Messages.

    def poll(self) -> bool:
        """Go on without waiting; returns whether anything moved."""
        moved = False
        for link in self._links.values():
            moved = link.poll() or moved
        now_s = time.perf_counter()
        if now_s - self._looked_s > min(_LOOK_AGAIN_S, self._timeout_s / 10):
            self._look_around(now_s)
        if self._ledger.closed and not self.finished:
            if not self._sent_close:
                self._sent_close = True
                for peer in self._others:
                    self._links[peer].send((2, 0, 0), Header(Kind.CLOSE))
            self.finished = not self._open_servers and all(link.idle for link in self._links.values())
        return moved

    def _arrived(self, peer: int, header: Header, data: torch.Tensor) -> None:
        started_ns = time.perf_counter_ns() if trace.enabled() else 0
        self._ledger.now_s = time.perf_counter()
        if header.kind == Kind.CLOSE and peer in self._open_servers:
            self._open_servers.remove(peer)
            return
        self.server.receive(peer, header, data)
        if started_ns:
            trace.record(self._describe(peer, header), "server", started_ns, time.perf_counter_ns())
        if header.kind != Kind.CLOSE:
            self._links[peer].listen()
        self._send()

    def _describe(self, peer: int, header: Header) -> str:
        names = self._ledger.shard.names
        named = header.kind in (Kind.PUSH, Kind.PULL, Kind.INIT, Kind.GET_STATE, Kind.SET_STATE)
        what = f" {names[header.key]}" if named and header.key < len(names) else ""
        return f"{header.kind.name.lower()}{what} of peer {peer}, clock {header.clock}"

    def _send(self) -> None:
        outbox, self._ledger.outbox = self._ledger.outbox, []
        for peer, header, data in outbox:
            # Of values, those that forward needs first; answers without numbers before all, for they are short.
            order = (1, 0, header.key) if header.kind in (Kind.VALUES, Kind.STATE) else (0, 0, 0)
            self._links[peer].send(order, header, data)

    def _look_around(self, now_s: float) -> None:
        """Refuse, or warn of, requests that have waited for long."""
        self._looked_s = self._ledger.now_s = now_s
        # Before the worker that waits gives up by itself: the worker knows only that this server is silent.
        self.server.give_up(0.9 * self._timeout_s)
        overdue = self.server.overdue(WARN_AFTER_S)
        if overdue and now_s - self._warned_s > WARN_AFTER_S:
            self._warned_s = now_s
            waiting, who = overdue[0]
            log.warning("%s waits at clock %d for %s", self._ledger.names[waiting.worker], waiting.header.clock, who)
        self._send()
