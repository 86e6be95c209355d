"""How a store ends: its user closes it, or drops it, or the group or the program ends before.

A worker that left without a word would keep the servers and the other workers waiting. So whoever ends a store, the
servers hear of it; and nothing here holds the store itself, whose values go when nobody has it any more.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Protocol

from ..errors import CommlabError
from ..runtime.group import Group
from ..transport.base import Transport
from .worker.client import Client
from .worker.requests import Requests

_ABANDON_S = 1.0
"""How long a store that nobody has any longer waits for the servers to know it."""


class Closable(Protocol):
    """A store."""

    def close(self) -> None:
        """Tell the servers that this worker needs them no more."""


class StoreEnding:
    """The end of ``store``, which is built in ``group`` and sends over ``transport``. ``workers``: the workers' own
    group, where that is another one. The end of ``group`` closes the store."""

    def __init__(self, store: Closable, group: Group, transport: Transport, workers: Group | None):
        self._of_group, self._transport = group.endings, transport
        self._close = partial(_close, weakref.ref(store))
        self._pair = self._close, partial(_free, transport, workers)
        self._of_group.append(self._pair)
        self._dropped: weakref.finalize[..., Closable] | None = None

    def watch(self, store: Closable, client: Client, requests: Requests) -> None:
        """From now on the end of the program closes the store, a worker's, and so does Python when nobody has it any
        longer."""
        atexit.register(self._close)
        self._dropped = weakref.finalize(store, _abandon, client, requests, self._close)
        self._dropped.atexit = False

    def begin(self) -> None:
        """The store is being closed, and nobody else need do it."""
        atexit.unregister(self._close)
        if self._dropped is not None:
            self._dropped.detach()

    def complete(self) -> None:
        """The store is through with all messages, and holds nothing of its group any more."""
        if self._pair in self._of_group:
            self._of_group.remove(self._pair)
            self._transport.close()


def _close(reference: weakref.ref[Closable]) -> None:
    store = reference()
    if store is not None:
        store.close()


def _free(transport: Transport, workers: Group | None) -> None:
    transport.close()
    if workers is not None:
        workers.close()


def _abandon(client: Client, requests: Requests, at_exit: Callable[[], None]) -> None:
    """A store that was not closed is gone: tell the servers that this worker sends nothing more. Nobody may have to
    wait here for long: what can't leave at once stays where it is."""
    atexit.unregister(at_exit)
    with contextlib.suppress(CommlabError):
        closed = requests.close(client.clock)
        stop_s = time.perf_counter() + _ABANDON_S
        while not closed.done() and time.perf_counter() < stop_s:
            os.sched_yield()
