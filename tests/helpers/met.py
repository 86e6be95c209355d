"""Ranks of one process that get connected as those of a job do, over a launcher's channel between threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from linked import on_all

from commlab.transport import handshake


class Channel:
    """The launcher's channel, between threads: everyone's bytes to everyone. ``altered``: what ranks are told."""

    def __init__(self, size: int, altered: Callable[[int, list[bytes]], list[bytes]] | None = None):
        self._barrier, self._said = threading.Barrier(size), [b""] * size
        self._altered = altered or (lambda rank, said: said)

    def gather(self, rank: int) -> Callable[[bytes], list[bytes]]:
        def gather(data: bytes) -> list[bytes]:
            self._said[rank] = data
            self._barrier.wait(30)
            said = self._altered(rank, list(self._said))
            self._barrier.wait(30)
            return said

        return gather


def connect_all(size: int, channel: Channel | None = None, **options: Any) -> list[Any]:
    channel = channel or Channel(size)
    options.setdefault("timeout_s", 20.0)
    return on_all(list(range(size)), lambda rank: handshake.connect(rank, channel.gather(rank), **options))
