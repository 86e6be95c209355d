"""Records over a torch.distributed store, for ranks that share a window: their numbers need no messages, and what is
left, the window's opening and the texts of a disagreement, may take a store's 0.2 ms. No two ranks are connected."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch.distributed as dist

from ..errors import PeerLostError, PeerTimeoutError, UsageError
from .base import Bytes, Contexts, Exchange, Piggyback, Request

_PAUSE_S, _LONGEST_PAUSE_S = 50e-6, 5e-3
_OTHERS_READ_S = 1.0


def wait_for(store: dist.Store, keys: Sequence[str], timeout_s: float) -> bool:
    """Whether all ``keys`` are there within ``timeout_s``.

    Asks again and again, because a store's own wait keeps the connection, of which a process has one: two threads that
    open two groups, in another order on another rank, would wait for each other for ever.
    """
    stop_s, pause_s = time.monotonic() + timeout_s, _PAUSE_S
    while not store.check(list(keys)):
        if time.monotonic() > stop_s:
            return False
        time.sleep(pause_s)
        pause_s = min(_LONGEST_PAUSE_S, 1.2 * pause_s)
    return True


def values_of(store: Any, keys: Sequence[str]) -> list[bytes]:
    """The values of keys that are there; in one round trip where the store can."""
    if store.has_extended_api():
        return [bytes(value) for value in store.multi_get(list(keys))]
    return [bytes(store.get(key)) for key in keys]


class StoreExchange(Exchange):
    """Everyone's records as values of the store, one key per rank."""

    __slots__ = ("_found", "_keys", "_rank", "_store")

    def __init__(self, store: dist.Store, keys: Sequence[str], rank: int, record: bytes):
        self._store, self._keys, self._rank, self.size = store, keys, rank, len(keys)
        self._found: list[bytes] = []
        store.set(keys[rank], record)  # type: ignore[arg-type]

    def test(self) -> bool:
        if not self._found and not self.peers():
            self._found = values_of(self._store, self._keys)
            self._let_others_read()
        return bool(self._found)

    def _let_others_read(self) -> None:
        """Wait a little for those who have not read yet: one of these ranks may be the store's home, and end with the
        error that it has just read."""
        with suppress(RuntimeError):
            self._store.set(f"{self._keys[self._rank]}/read", "yes")
            wait_for(self._store, [f"{key}/read" for key in self._keys], _OTHERS_READ_S)

    def block(self, timeout_s: float) -> None:
        """Wait for the records of all, or for ``timeout_s``."""
        wait_for(self._store, self._keys, timeout_s)

    def peers(self) -> Sequence[int]:
        if self._found or self._store.check(list(self._keys)):
            return ()
        return [rank for rank, key in enumerate(self._keys) if not self._store.check([key])]

    def agreed(self, record: bytes) -> bool:
        return all(found == record for found in self._found)

    def records(self) -> list[bytes]:
        return list(self._found)


class StoreTransport:
    """``size`` ranks that know each other by ``store`` alone; ``store`` is theirs, so that no key means another
    thing."""

    name = "store"
    threads = True
    piggyback_bytes = 0
    moves_itself = False

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float):
        self._store, self.rank, self.size, self._timeout_s = store, rank, size, timeout_s
        self._exchanges = 0
        self.contexts = Contexts(0)

    def _keys(self) -> list[str]:
        self._exchanges += 1
        return [f"{self._exchanges}/{rank}" for rank in range(self.size)]

    def exchange(self, record: bytes, piggyback: Piggyback | None = None) -> Exchange:
        assert piggyback is None
        return StoreExchange(self._store, self._keys(), self.rank, record)

    def gather(self, data: bytes, name: str) -> list[bytes]:
        """Every rank's ``data``, of any length, on every rank, in rank order; ``name`` is for messages. Collective;
        waits. PeerTimeoutError with the ranks that did not come. Cost: three round trips to the store."""
        keys = self._keys()
        # A store keeps no empty values apart from missing ones.
        self._store.set(keys[self.rank], b"." + data)  # type: ignore[arg-type]
        try:
            if wait_for(self._store, keys, self._timeout_s):
                return [value[1:] for value in values_of(self._store, keys)]
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        except RuntimeError as error:
            raise PeerLostError(f"rank {self.rank}: the store is gone, with {name}: {error}") from error
        raise PeerTimeoutError(
            f"rank {self.rank} has waited {self._timeout_s:.0f} s for ranks {missing} in {name}; they may be stuck, or "
            "never have started: see their own output, or raise the timeout of init_process_group or new_group"
        )

    def isend(self, data: Bytes, to: int) -> Request:
        self._no_messages()

    def irecv(self, data: Bytes, frm: int) -> Request:
        self._no_messages()

    def split(self, ranks: Sequence[int], context: int, *, any_order: bool = False) -> StoreTransport | None:
        self._no_messages()

    def beside(self) -> StoreTransport:
        raise UsageError(
            f"rank {self.rank}: ranks that meet in a torch.distributed store have no messages of commlab's; use "
            "torch.distributed's send and recv"
        )

    def _no_messages(self) -> NoReturn:
        raise NotImplementedError("ranks that meet in a store have a window, or another transport, for their numbers")

    def abort(self, code: int) -> None:
        import os

        os._exit(code)

    def close(self, orderly: bool = True) -> None:
        pass
