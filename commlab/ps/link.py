"""Messages to and from one peer: headers and the bytes that follow them, over any transport, without ever waiting.

Outgoing messages are sorted by urgency, not by age: of the messages that this rank has for a peer at the moment, those
of an older clock go first, then those whose values forward needs first. ``IN_FLIGHT`` messages at a time are handed to
the transport, so that a more urgent message never waits for long.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

from ..transport.base import Bytes, Request, Transport
from .messages import HEADER_BYTES, IN_FLIGHT, Header, unpack

Order: TypeAlias = tuple[int, int, int]
"""(clock, 0 for numbers or 1 for a message that must come after them, slice): the smaller goes sooner."""

_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


class Link:
    """The messages between this rank and ``peer``. ``memory_for(header)``: memory for the bytes that follow a header,
    or None to be asked again; ``arrived(header, data)``: called with every message once all its bytes are there, and
    ``ready(header, data)`` says that it can be taken in, or is asked again."""

    def __init__(
        self,
        transport: Transport,
        peer: int,
        memory_for: Callable[[Header], torch.Tensor | None],
        arrived: Callable[[Header, torch.Tensor], None],
        ready: Callable[[Header, torch.Tensor], bool] | None = None,
    ):
        self._transport, self.peer = transport, peer
        self._memory_for, self._arrived, self._ready = memory_for, arrived, ready
        self._queue: list[tuple[Order, int, Bytes, Bytes | None]] = []
        self._queued = 0
        self._flying: deque[list[Request]] = deque()
        self._sending: deque[tuple[Bytes, Bytes | None]] = deque()
        """The memory of the messages in ``_flying``, kept alive until they have left."""
        self._head = np.empty(HEADER_BYTES, np.uint8)
        self._header: Header | None = None
        self._data: torch.Tensor | None = None
        self._incoming: Request | None = None
        self.bytes_sent = self.messages_sent = 0

    def send(self, order: Order, header: Header, data: torch.Tensor | None = None) -> None:
        """Queue a message; ``data`` (bytes) must stay unchanged until the message has left."""
        head = np.frombuffer(bytearray(header.pack()), np.uint8)
        follows = data.numpy() if data is not None and data.numel() else None
        heapq.heappush(self._queue, (order, self._queued, head, follows))
        self._queued += 1

    @property
    def idle(self) -> bool:
        """Whether every queued message has left."""
        return not self._queue and not self._flying

    @property
    def moving(self) -> bool:
        """Whether bytes of a message are under way: many transports move bytes only while somebody looks."""
        return (self._data is not None and self._incoming is not None) or bool(self._flying)

    def listen(self) -> None:
        """Expect one message. Call this method again after each message that has arrived if another will come."""
        self._header = self._data = None
        self._incoming = self._transport.irecv(self._head, self.peer)

    @property
    def listening(self) -> bool:
        """Whether a message is expected, or its bytes are."""
        return self._incoming is not None or self._header is not None

    def poll(self) -> bool:
        """Go on as far as possible; returns whether anything moved."""
        moved = self.poll_sends()
        return self._poll_receive() or moved

    def poll_sends(self) -> bool:
        """Send as far as possible; returns whether anything moved."""
        moved = False
        while self._flying and all(request.test() for request in self._flying[0]):
            self._flying.popleft()
            self._sending.popleft()
            moved = True
        while self._queue and len(self._flying) < IN_FLIGHT:
            _, _, head, follows = heapq.heappop(self._queue)
            requests: list[Request] = [self._transport.isend(head, self.peer)]
            if follows is not None:
                requests.append(self._transport.isend(follows, self.peer))
            self._flying.append(requests)
            self._sending.append((head, follows))
            self.messages_sent += len(requests)
            self.bytes_sent += head.size + (0 if follows is None else follows.size)
            moved = True
        return moved

    def _poll_receive(self) -> bool:
        moved = False
        if self._header is None:
            if self._incoming is None or not self._incoming.test():
                return False
            self._incoming = None
            self._header = unpack(self._head.tobytes(), f"rank {self.peer}")
            moved = True
        if self._data is None:
            self._data = self._memory_for(self._header)
            if self._data is None:
                return moved
            if self._header.length:
                self._incoming = self._transport.irecv(self._data.numpy(), self.peer)
            moved = True
        if self._incoming is not None:
            if not self._incoming.test():
                return moved
            self._incoming = None
        if self._ready is not None and not self._ready(self._header, self._data):
            return moved
        header, data = self._header, self._data
        self._header = self._data = self._incoming = None
        self._arrived(header, data)
        return True
