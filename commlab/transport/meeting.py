"""Ranks meet: this rank's side of a proved TCP connection to each of the others.

It listens and connects at once, to all addresses of a peer, the better ones a moment earlier. A connection counts once
both ends have proved that they know the job's key; the first that does is kept. The proof is an HMAC over a nonce of
each side, so nothing that was overheard can be used again:

    r to p    "commlab", r, p, nonce of r
    p to r    nonce of p, HMAC("listener", all of the above)
    r to p    HMAC("connector", all of the above)
    p to r    "+"

A stranger is dropped as soon as it says something wrong, and after a second if it says nothing; it delays nobody.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress

from .cards import Card
from .congestion import begin_congestion

PROOF_S = 1.0
"""Who has not proved itself after so long is dropped; a peer that was only slow tries again."""

_RETRY_S = 0.1
_STAGGER_S = 0.03
_UNPROVED = 256
"""Connections that have proved nothing yet; of more the oldest is dropped."""

_MAGIC = b"commlab1"
_HELLO = struct.Struct("!8sII16s")
_NONCE_BYTES, _PROOF_BYTES = 16, 32


def proof(key: bytes, side: bytes, *transcript: bytes) -> bytes:
    """What only a rank of the job can answer to the messages before."""
    return hmac.new(key, side + b"".join(transcript), hashlib.sha256).digest()


class _Talk:
    """One connection on its way to being proved: what must arrive next, and what has arrived of it."""

    def __init__(self, connection: socket.socket, peer: int, expects: int, until_s: float):
        self.connection, self.peer, self.expects, self.until_s = connection, peer, expects, until_s
        self.arrived = b""
        self.transcript = b""
        self.step = 0

    def read(self) -> bytes | None:
        """The message, once it is complete. ConnectionError when the other end is gone."""
        try:
            data = self.connection.recv(self.expects - len(self.arrived))
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionError("closed by the other end")
        self.arrived += data
        if len(self.arrived) < self.expects:
            return None
        message, self.arrived = self.arrived, b""
        return message


class _Candidate:
    """An address of a peer: when it is tried next, and what became of it."""

    def __init__(self, peer: int, address: tuple[str, int], next_s: float):
        self.peer, self.address, self.next_s = peer, address, next_s
        self.talk: _Talk | None = None
        self.outcome = "not tried"


class Meeting:
    """Listens and connects until this rank has a proved connection to every other."""

    def __init__(self, rank: int, cards: Sequence[Card], key: bytes, listeners: Sequence[socket.socket]):
        self.rank, self.size, self._key, self._listeners = rank, len(cards), key, listeners
        self.connected: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._incoming: list[_Talk] = []
        now_s = time.monotonic()
        self._candidates = [
            _Candidate(peer, address, now_s + at * _STAGGER_S)
            for peer in range(rank)
            for at, address in enumerate(reachable(cards[peer], cards[rank]))
        ]
        for listener in listeners:
            self._selector.register(listener, selectors.EVENT_READ, listener)

    def run(self, timeout_s: float) -> str:
        """Empty when all are connected; else the sentence that says who is not, and what was tried."""
        deadline_s = time.monotonic() + timeout_s
        while len(self.connected) < self.size - 1:
            now_s = time.monotonic()
            if now_s > deadline_s:
                return self._problem(timeout_s)
            self._try_again(now_s)
            self._drop_silent(now_s)
            for key, _ in self._selector.select(0.02):
                if isinstance(key.data, socket.socket):
                    self._accept(key.data)
                elif isinstance(key.data, _Candidate):
                    self._go_on(key.data)
                else:
                    self._hear(key.data)
        return ""

    # The side that connects

    def _try_again(self, now_s: float) -> None:
        for each in self._candidates:
            if each.talk is None and each.peer not in self.connected and now_s >= each.next_s:
                self._try(each, now_s)

    def _try(self, candidate: _Candidate, now_s: float) -> None:
        host, port = candidate.address
        connection = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            begin_congestion(connection)
            connection.connect((host, port))
        except BlockingIOError:
            pass
        except OSError as error:
            connection.close()
            candidate.outcome, candidate.next_s = str(error), now_s + _RETRY_S
            return
        candidate.outcome = "no answer"
        # Until the peer has taken the connection this takes as long as it takes: hosts may still be starting.
        candidate.talk = _Talk(connection, candidate.peer, _NONCE_BYTES + _PROOF_BYTES, now_s + 5)
        self._selector.register(connection, selectors.EVENT_WRITE, candidate)

    def _go_on(self, candidate: _Candidate) -> None:
        talk = candidate.talk
        if talk is None:  # given up since the selector saw it
            return
        try:
            self._speak(candidate, talk)
        except OSError as error:
            self._give_up(candidate, str(error))

    def _speak(self, candidate: _Candidate, talk: _Talk) -> None:
        connection = talk.connection
        if talk.step == 0:
            code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            talk.transcript = _HELLO.pack(_MAGIC, self.rank, candidate.peer, os.urandom(_NONCE_BYTES))
            connection.sendall(talk.transcript)
            talk.step = 1
            self._selector.modify(connection, selectors.EVENT_READ, candidate)
            return
        message = talk.read()
        if message is None:
            return
        if talk.step == 1:
            nonce = message[:_NONCE_BYTES]
            if not hmac.compare_digest(message[_NONCE_BYTES:], proof(self._key, b"listener", talk.transcript, nonce)):
                raise ConnectionError("who answered is not a rank of this job")
            if candidate.peer in self.connected or any(
                other.peer == candidate.peer and other.talk is not None and other.talk.step == 2
                for other in self._candidates
            ):
                raise ConnectionError("another address was faster")
            connection.sendall(proof(self._key, b"connector", talk.transcript, nonce))
            talk.step, talk.expects = 2, 1
            return
        self._selector.unregister(connection)
        self.connected[candidate.peer] = connection
        candidate.talk = None
        for other in self._candidates:
            if other.peer == candidate.peer and other.talk is not None:
                self._give_up(other, "another address was faster")

    def _give_up(self, candidate: _Candidate, outcome: str) -> None:
        assert candidate.talk is not None
        self._forget(candidate.talk)
        candidate.talk, candidate.outcome = None, outcome
        candidate.next_s = time.monotonic() + _RETRY_S

    # The side that listens

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        if len(self._incoming) >= _UNPROVED:
            self._forget(self._incoming.pop(0))
        talk = _Talk(connection, -1, _HELLO.size, time.monotonic() + PROOF_S)
        self._incoming.append(talk)
        self._selector.register(connection, selectors.EVENT_READ, talk)

    def _hear(self, talk: _Talk) -> None:
        if talk not in self._incoming:  # dropped since the selector saw it
            return
        try:
            message = talk.read()
            if message is not None:
                self._answer(talk, message)
        except OSError:
            self._incoming.remove(talk)
            self._forget(talk)

    def _answer(self, talk: _Talk, message: bytes) -> None:
        if talk.step == 0:
            magic, peer, to, _ = _HELLO.unpack(message)
            if magic != _MAGIC or to != self.rank or not self.rank < peer < self.size:
                raise ConnectionError("a stranger")
            nonce = os.urandom(_NONCE_BYTES)
            talk.connection.sendall(nonce + proof(self._key, b"listener", message, nonce))
            talk.transcript, talk.peer, talk.step, talk.expects = message + nonce, peer, 1, _PROOF_BYTES
            return
        if not hmac.compare_digest(message, proof(self._key, b"connector", talk.transcript)):
            raise ConnectionError("a stranger")
        talk.connection.sendall(b"+")
        self._incoming.remove(talk)
        self._selector.unregister(talk.connection)
        # A peer that tries again has given its earlier connection up.
        earlier = self.connected.pop(talk.peer, None)
        if earlier is not None:
            earlier.close()
        self.connected[talk.peer] = talk.connection

    def _drop_silent(self, now_s: float) -> None:
        for talk in [each for each in self._incoming if now_s > each.until_s]:
            self._incoming.remove(talk)
            self._forget(talk)
        for candidate in self._candidates:
            if candidate.talk is not None and now_s > candidate.talk.until_s:
                self._give_up(candidate, "no answer")

    def _forget(self, talk: _Talk) -> None:
        self._selector.unregister(talk.connection)
        talk.connection.close()

    def _problem(self, timeout_s: float) -> str:
        missing = [peer for peer in range(self.size) if peer != self.rank and peer not in self.connected]
        tried = "; ".join(
            f"rank {each.peer} at {each.address[0]} port {each.address[1]}: {each.outcome}"
            for each in self._candidates
            if each.peer in missing
        )
        names = ", ".join(map(str, missing))
        return (
            f"rank {self.rank}: no link to rank{'s' if len(missing) > 1 else ''} {names} after {timeout_s:g} s"
            f"{f' ({tried})' if tried else ''}; name an interface that all hosts reach each other by with --iface, or "
            "use --links mpi"
        )

    def close(self) -> None:
        """Close everything but what is connected."""
        for talk in self._incoming:
            self._forget(talk)
        for candidate in self._candidates:
            if candidate.talk is not None:
                self._forget(candidate.talk)
        self._incoming.clear()
        for listener in self._listeners:
            listener.close()
        with suppress(OSError):
            self._selector.close()


def reachable(peer: Card, own: Card) -> list[tuple[str, int]]:
    """The addresses of ``peer`` to try from the host of ``own``: loopback only where both are on one network."""
    same = peer.network == own.network
    return [(host, port) for host, port in peer.listens if same or not (host.startswith("127.") or host == "::1")]
