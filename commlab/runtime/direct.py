"""Messages between two ranks of a group, beside its collectives: a queue for each peer and direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..transport.base import Pending, Transport
from .handle import Handle, Operation
from .progress import Progress


class Direct:
    """The point-to-point messages of a group over ``transport``, whose messages never meet the group's. ``progress``:
    the group's own queue. What ends one of them ends all: a peer that is gone is gone for everybody."""

    def __init__(self, transport: Transport, timeout_s: float, departed: Callable[[int], str], progress: Progress):
        self._transport, self._timeout_s, self._departed, self._progress = transport, timeout_s, departed, progress
        self._queues: dict[tuple[int, str], Progress] = {}

    def start(self, peer: int, direction: str, body: Callable[[Transport], Pending], words: str, result: Any) -> Handle:
        """Queue ``body(transport)`` behind what goes to ``peer`` in this ``direction`` already, and start it where
        nothing does. ``words``: the operation, in messages."""
        key = peer, direction
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = Progress(self._transport.rank, self._timeout_s, threaded=False)
            queue.tie(self._progress)
        ended = queue.ended or self._progress.ended
        if ended is not None:
            raise ended.error(words, self._transport.rank)
        handle = Handle(queue, lambda: words, result)
        return queue.submit(Operation(body(self._transport), handle, self._transport.rank, self._departed))

    def close(self, orderly: bool) -> None:
        """Take no more messages."""
        for queue in self._queues.values():
            queue.close()
        self._transport.close(orderly)
