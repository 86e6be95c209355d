"""An engine of links whose peers are sockets that a test reads and writes by hand: the order of all events is the
test's."""

from __future__ import annotations

import socket
import struct
from array import array
from typing import Any

import pytest
import torch
from linked import wait_for

from commlab.chunks import EMPTY
from commlab.errors import PeerLostError
from commlab.native.library import built
from commlab.runtime.programs import native_operand
from commlab.transport.base import Offload
from commlab.transport.tcp import Links

OPERATIONS, MESSAGES, CONTROL = 0, 1, 0xFFFFFFFF
"""Channels of group 0, and that of the engines' own words."""

LOST, BROKEN = 2, 3
SEND, WRITE, REDUCE = 0, 1, 2
RECORD = b"0123456789abcdef"


class Peer:
    """A rank by hand."""

    def __init__(self, end: socket.socket):
        self.socket = end
        self._sent: dict[int, int] = {}
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # long frames are sent before they are read
        end.settimeout(10)

    def say(self, channel: int, payload: bytes, sequence: int | None = None, cut: int | None = None) -> None:
        """Send a frame. ``cut``: no more than so many of its bytes."""
        if sequence is None:
            sequence = self._sent.get(channel, 0)
            self._sent[channel] = sequence + 1
        self.socket.sendall((struct.pack("<IIII", channel, sequence, len(payload), 0) + payload)[:cut])

    def tell(self, kind: int, group: int, *numbers: int, text: bytes = b"") -> None:
        self.say(CONTROL, struct.pack(f"<{1 + len(numbers)}I", group, *numbers) + text, kind)

    def end(self) -> None:
        self.socket.close()

    def _all(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            more = self.socket.recv(count - len(found))
            assert more, "the engine has closed the connection"
            found += more
        return found

    def heard(self) -> tuple[int, int, bytes]:
        """The next frame from the engine: channel, sequence (of control frames: kind) and payload."""
        channel, sequence, length, _ = struct.unpack("<IIII", self._all(16))
        return channel, sequence, self._all(length)

    def heard_words(self) -> tuple[int, tuple[int, ...]]:
        """The next control frame, whatever comes before: kind and numbers."""
        while (frame := self.heard())[0] != CONTROL:
            pass
        return frame[1], struct.unpack_from("<2I", frame[2])

    def silent(self) -> bool:
        """Whether nothing but numbers has come from the engine by now."""
        self.socket.setblocking(False)
        try:
            found = self.socket.recv(1 << 20)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(10)
        at = 0
        while at < len(found):
            channel, _, length, _ = struct.unpack_from("<IIII", found, at)
            if channel == CONTROL:
                return False
            at += 16 + length
        return True


class Job:
    """Rank 0 with an engine, and its peers, ranks 1 and 2, by hand."""

    def __init__(self) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        self.links = Links(0, [-1, *(ours.detach() for ours, _ in pairs)], checks=False)
        self.transport = self.links.world()
        self.one, self.two = (Peer(theirs) for _, theirs in pairs)

    def rows(self, numbers: torch.Tensor, *rows: tuple[int, int], record: bytes = b"") -> Any:
        """Start an operation that does ``rows``, opcodes and peers, to all numbers, one after the other."""
        assert built is not None
        numel, count = numbers.numel(), len(rows)
        table = array("Q", [number for opcode, peer in rows for number in (opcode, peer, 0, numel)]).tobytes()
        first = array("I", [*range(count), count - 1]).tobytes()
        program = built.LinksProgram(table, first, array("I", range(1, count)).tobytes(), numel, 3)
        operand, keep = native_operand(numbers, "sum", 1, False, EMPTY)
        return self.transport.launch(record, Offload(operand, keep, program, None, 0, 0))

    def close(self) -> None:
        self.links.engine.leave(0.0)
        for peer in (self.one, self.two):
            peer.end()


def pending(request: Any) -> bool:
    """Whether the request is still under way once the engine has done all that it can do now."""
    request.block(0.05)
    return not request.test()


def lost(request: Any, rank: int, match: str = "") -> None:
    with pytest.raises(PeerLostError, match=f"the links lost rank {rank}: .*{match}") as found:
        wait_for(request, 5)
    assert found.value.rank == rank
