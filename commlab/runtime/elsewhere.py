"""Waits that another library does for a group: torch's gloo under ``ddp``, Horovod. They do not look up, so the watch
ends them when a rank has left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..errors import PeerLostError
from ..job.launch import end_job, report
from .group import Group
from .waiting import GONE_AFTER_S, gone_words

_ENDED_S = 0.3
"""How long the library may take to come back once its connections have been ended."""


@contextmanager
def waiting_elsewhere(group: Group, what: str, abort: Callable[[], object] | None = None) -> Iterator[None]:
    """A library waits in this block for all ranks of ``group``. PeerLostError when one of them has left, before or
    meanwhile. ``abort()``: makes the library give up, with an exception; without it, or where it does not help, this
    rank ends with the message. ``what``: for the message. Cost: none to speak of while all ranks are there."""
    watch = group.watch
    if watch is None:
        yield
        return
    ended = threading.Event()
    peers = [rank for rank in range(group.size) if rank != group.rank]

    def gone(wait_s: float = 0.0) -> str:
        return gone_words(group.rank, peers, group.departed, lambda: what, wait_s)

    def give_up() -> None:
        if ended.wait(GONE_AFTER_S):
            return
        if abort is not None:
            with suppress(Exception):
                abort()
            if ended.wait(_ENDED_S):
                return
        report(PeerLostError(gone()), None)
        end_job(1)

    def call() -> None:
        if gone():
            threading.Thread(target=give_up, name="commlab gives up", daemon=True).start()

    watch.calls.append(call)
    try:
        call()
        yield
    except Exception as error:
        # The library may notice by itself, and before the watch does; any other error is none of ours.
        lost = isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "onnection", "bort"))
        if lost and (sentence := gone(GONE_AFTER_S)):
            raise PeerLostError(f"{sentence}: {error}") from error
        raise
    finally:
        ended.set()
        with suppress(ValueError):
            watch.calls.remove(call)
