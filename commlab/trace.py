"""Spans of time, kept in a fixed ring and written as Chrome / Perfetto JSON.

Off (the default) a span costs one branch. On, it costs two clock reads and one list store; nothing is ever
synchronized, so looking does not change the run. The newest ``CAPACITY`` spans are kept.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

CAPACITY = 100_000

_spans: deque[tuple[str, str, int, int, dict[str, Any]]] | None = None
_clock_offset_ns = 0
_nothing = nullcontext()


def enable() -> None:
    """Start to record spans in this process."""
    global _spans, _clock_offset_ns
    _spans = deque(maxlen=CAPACITY)
    # Ranks on other hosts have other monotonic clocks: spans are stored against the wall clock of one reading.
    _clock_offset_ns = time.time_ns() - time.perf_counter_ns()


def disable() -> None:
    """Record no more spans, and forget those that there are."""
    global _spans
    _spans = None


def enabled() -> bool:
    return _spans is not None


class _Span:
    __slots__ = ("args", "lane", "name", "start_ns")

    def __init__(self, name: str, lane: str, args: dict[str, Any]):
        self.name, self.lane, self.args = name, lane, args

    def __enter__(self) -> None:
        self.start_ns = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        record(self.name, self.lane, self.start_ns, time.perf_counter_ns(), **self.args)


def span(name: str, lane: str = "compute", **args: Any) -> Any:
    """Context manager that records the time spent inside, under ``lane`` (one row of the picture)."""
    return _nothing if _spans is None else _Span(name, lane, args)


def record(name: str, lane: str, start_ns: int, stop_ns: int, **args: Any) -> None:
    """Store a span whose two ``time.perf_counter_ns()`` readings were taken by the caller."""
    if _spans is not None:
        _spans.append((name, lane, start_ns, stop_ns, args))


def dump() -> bytes:
    """This rank's spans as a JSON array ``[name, lane, start_ns, duration_ns, args]``, in the order in which they
    ended."""
    # Integers: the time of day in microseconds has no room left in a float for their fractions.
    return json.dumps(
        [
            [name, lane, start_ns + _clock_offset_ns, stop_ns - start_ns, args]
            for name, lane, start_ns, stop_ns, args in list(_spans or ())
        ]
    ).encode()


def write(path: str | Path, dumps: Iterable[bytes], about: dict[str, Any] | None = None) -> None:
    """Write all ranks' :func:`dump` (in rank order) as one file that Perfetto and chrome://tracing open: one process
    per rank, one thread row per lane, times from the first span on. ``about``: what was traced, kept in the file."""
    ranks = [json.loads(dump) for dump in dumps]
    origin_ns = min((span[2] for spans in ranks for span in spans), default=0)
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        lanes = {lane: at for at, lane in enumerate(dict.fromkeys(span[1] for span in spans))}
        for lane, at in lanes.items():
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": at, "args": {"name": lane}})
        for name, lane, start_ns, duration_ns, args in spans:
            events.append(
                {
                    "ph": "X",
                    "name": name,
                    "pid": rank,
                    "tid": lanes[lane],
                    "ts": (start_ns - origin_ns) / 1e3,
                    "dur": duration_ns / 1e3,
                    "args": args,
                }
            )
    written = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about or {}}
    Path(path).write_text(json.dumps(written))
