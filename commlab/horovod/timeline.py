"""Horovod's timeline: commlab's trace, written where the program wants it."""

from __future__ import annotations

import os
import time

from .. import trace

_path: str | None = None
_rank = 0
_started_us = 0


def begin(rank: int) -> None:
    """Called by init(): HOROVOD_TIMELINE may name a file."""
    global _rank
    _rank = rank
    path = os.environ.get("HOROVOD_TIMELINE", "")
    if path and path != "DYNAMIC":
        start(path)


def start(path: str) -> None:
    """Record spans from now on; what was recorded before goes to the file that it was meant for."""
    global _path, _started_us
    end()
    _path, _started_us = path, time.time_ns() // 1000
    trace.enable()


def end() -> None:
    """Write the file, on rank 0, and record no more."""
    global _path
    path, _path = _path, None
    if path is not None:
        dump = trace.dump()
        trace.disable()
        if _rank == 0:
            trace.write(path, [dump], {"start_time_since_epoch_in_micros": _started_us})
