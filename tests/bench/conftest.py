"""A trace that several tests read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commlab import trace

MS = 1_000_000


def span(name: str, lane: str, start_ms: float, stop_ms: float, **args: Any) -> list[Any]:
    return [name, lane, int(start_ms * MS), int((stop_ms - start_ms) * MS), args]


def step(number: int, start_ms: float) -> list[list[Any]]:
    """Of 100 ms: forward with a wait in it, backward with a bucket packed, 30 ms of waiting, of which 10 are twice."""
    return [
        span("wait for h.0", "compute", start_ms + 5, start_ms + 10),
        span("forward", "compute", start_ms, start_ms + 20),
        span("pack bucket 0", "compute", start_ms + 40, start_ms + 41),
        span("backward", "compute", start_ms + 20.5, start_ms + 69.5),
        span("backward", "compute", start_ms + 20, start_ms + 70),
        span("exchange", "compute", start_ms + 70, start_ms + 90),
        span("pull", "compute", start_ms + 80, start_ms + 95),
        span("step", "compute", start_ms + 70, start_ms + 100),
        span(f"step {number}", "steps", start_ms, start_ms + 100, step=number),
        span("allreduce #3 'bucket 0' of float32[4] (mean)", "exchange", start_ms + 41, start_ms + 75),
        span("exchange #4 'norm'", "exchange", start_ms + 75, start_ms + 76),
        span("pull of 'h.0.weight' at clock 1", "exchange", start_ms + 92, start_ms + 108),
        span("pull of 'h.1.weight' .. 'h.1.bias' at clock 1", "exchange", start_ms + 93, start_ms + 112),
    ]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Rank 0 makes steps 0 to 2, rank 1 the same 10 ms later, and rank 2 serves."""
    one, other = ([each for at in range(3) for each in step(at, late + 100 * at)] for late in (1000, 1010))
    serves = [span("push h.1.weight of peer 0, clock 1", "server", 1150 + at, 1151 + at) for at in (0, 70)]
    about = {"command": "python -m commlab.train", "ranks": 3, "config": {"strategy": "ps", "servers": 1}}
    trace.write(tmp_path / "t.json", [json.dumps(spans).encode() for spans in (one, other, serves)], about)
    return tmp_path / "t.json"
