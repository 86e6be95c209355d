"""Waiting: the one loop in which a rank waits for others, whether for a collective's messages, as a worker for its
servers, or as a server for requests.

    nothing has moved for   2 ms    look again at once, offering the core to others between two looks
                            more    sleep a tenth of what was waited already: late by 10 % at most
                            0.3 s   PeerLostError if a rank that is waited for has left
                            10 s    a warning that names who is silent, and another one every 10 s
                            limit   PeerTimeoutError
"""

from __future__ import annotations

import logging
import math
import os
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from ..errors import PeerLostError, PeerTimeoutError

log = logging.getLogger("commlab")

WARN_AFTER_S = 10.0

GONE_AFTER_S = 0.3
"""So long a rank that has left may still be waited for: what it has sent before may be on its way."""

WORDS_S = 0.01
"""So long the watch is asked how a rank has ended that is known to be lost. Its words are worth no longer wait."""

SPIN_S = 2e-3
"""So long it is asked again at once: the fastest way to wait. (Asleep after 20 us, 64 KB took 4 ranks on 2 cores twice
as long.)"""

_MOVING_S = 5e-3
_CROWDED_S = 200e-6


under_way: dict[int, weakref.ref[Any]] = {}
"""The drivers that have operations under way, by their id()."""


def begin_moving(driver: Any) -> None:
    """From now on ``driver`` has operations under way that move only while somebody calls its ``poll()`` (or, where it
    has one, its ``move_aside()``): whoever waits for anything in this process does. Cheap, and kept up by drivers that
    no thread of their own moves on."""
    under_way[id(driver)] = weakref.ref(driver)


def stop_moving(driver: Any) -> None:
    """``driver`` has nothing under way any more."""
    under_way.pop(id(driver), None)


def others_move(driver: Any) -> bool:
    """Whether a driver other than ``driver`` has operations under way."""
    return len(under_way) > (id(driver) in under_way)


def move_others(driver: Any) -> None:
    """Move on, without waiting, what any driver but ``driver`` has under way. Two ranks may wait for operations of
    several groups, or of a group and a parameter server, in different orders: neither would come to an end if each of
    them moved only the one that it waits for."""
    # A copy, not a list of the items: making that may collect garbage between two of them, up to Python 3.11, and what
    # that runs may let another thread begin or end something. dict.copy() is one step.
    for key, reference in under_way.copy().items():
        other = reference()
        if other is None:
            if under_way.get(key) is reference:
                under_way.pop(key, None)
        elif other is not driver:
            with suppress(PeerLostError):  # which is told to whoever waits for that driver
                getattr(other, "move_aside", other.poll)()


class Waiter(Protocol):
    """What the loop asks of the side that waits. It may also have a ``driver``, which moves what it waits for."""

    def advance(self) -> object:
        """Go on as far as possible without waiting. Returns a mark that is another one whenever something has moved
        since the last call."""

    def rest(self, idle_s: float) -> None:
        """Wait a little, after nothing has moved for ``idle_s``."""

    def gone(self) -> str:
        """The sentence that says which of the ranks that are waited for have left; empty while all are there."""

    def silence(self, idle_s: float) -> str:
        """The sentence that says for whom this rank has waited ``idle_s``, and in what; empty while nobody owes it
        anything."""


def wait_until(finished: Callable[[], bool], waiter: Waiter, limit_s: float = math.inf) -> None:
    """Move ``waiter`` on until ``finished()``. PeerTimeoutError when nothing has moved for ``limit_s``, PeerLostError
    when a rank that is waited for has left."""
    mark: object = None
    driver = getattr(waiter, "driver", waiter)
    since_s = warned_s = time.perf_counter()
    while not finished():
        found = waiter.advance()
        now_s = time.perf_counter()
        if found != mark:
            mark, since_s, warned_s = found, now_s, now_s
        idle_s = now_s - since_s
        if idle_s > GONE_AFTER_S and (gone := waiter.gone()):
            raise PeerLostError(gone)
        if idle_s > limit_s and (silence := waiter.silence(idle_s)):
            raise PeerTimeoutError(f"{silence}; it may be stuck or slow: see its own output, or raise the timeout")
        if now_s - warned_s > WARN_AFTER_S and (silence := waiter.silence(idle_s)):
            warned_s = now_s
            log.warning("%s", silence)
        if idle_s and under_way:
            move_others(driver)
        waiter.rest(idle_s)


def pause(idle_s: float, spin_s: float | None = None) -> None:
    """Wait a little, having waited ``idle_s`` already. For ``spin_s`` (None: for :data:`SPIN_S`) only offer the core to
    others: the peer that is waited for may want it, also where nobody can see that (hosts that are containers of one
    machine; without the offer 4 B took 4 such hosts on 2 cores 3.9 ms instead of 1.8). Then sleep a tenth of what was
    waited already: late by 10 % at most, and a long wait costs nothing."""
    if idle_s < (SPIN_S if spin_s is None else spin_s):
        os.sched_yield()
    else:
        time.sleep(min(1e-3, max(20e-6, idle_s / 10)))


def spin_s(crowded: bool, moving: bool) -> float:
    """How long to look again at once. Not for long where ranks share cores (``crowded``); longer with bytes under way
    (``moving``): each look may move a piece of them without ending anything."""
    return _MOVING_S if moving else _CROWDED_S if crowded else SPIN_S


def silence_of(rank: int, peers: list[int] | tuple[int, ...], who: str, idle_s: float, what: str) -> str:
    """``rank 2 has waited 10.1 s for ranks 1, 3 in allreduce #7``; ``who``: what the peers are (``rank``, ``server
    rank``)."""
    names = f"{who}{'s' if len(peers) > 1 else ''} {', '.join(map(str, peers))}"
    return f"rank {rank} has waited {idle_s:.1f} s for {names} in {what}"


def gone_words(
    rank: int,
    peers: Sequence[int],
    departed: Callable[[int], str],
    describe: Callable[[], str],
    wait_s: float = 0.0,
) -> str:
    """``rank 2 left (exit code 3) while rank 0 is in allreduce #7``; empty while all ``peers`` are there.
    ``departed(peer)``: how one has left; ``wait_s``: how long the news may take."""
    if not peers:
        return ""
    stop_s = time.perf_counter() + wait_s
    while not (gone := [f"rank {peer} {how}" for peer in peers if (how := departed(peer))]):
        if time.perf_counter() >= stop_s:
            return ""
        time.sleep(1e-3)
    return f"{' and '.join(gone)} while rank {rank} is in {describe()}"
