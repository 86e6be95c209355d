"""Statistics of durations: medians of per-round ratios and their noise, percentiles, bandwidths; and sizes as text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

_UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3}


class Ratio(NamedTuple):
    """The median of per-round ratios, and the range that holds the true median in at least 95 of 100 runs (98.8 with 11
    rounds; with fewer than 6 rounds it is all that was seen, and holds it less often)."""

    median: float
    low: float
    high: float


def ratio(samples: Sequence[float], others: Sequence[float]) -> Ratio:
    """Compare two contestants round by round: a delay that slows a whole round cancels out.

    The range needs no idea of how noise is distributed: the true median lies below the k-th smallest of n ratios as
    often as fewer than k of n fair coins show heads.
    """
    ratios = sorted(one / other for one, other in zip(samples, others, strict=True))
    rounds, k, fewer = len(ratios), 1, 1
    while 2 * (fewer + math.comb(rounds, k)) <= 0.05 * 2**rounds:
        fewer += math.comb(rounds, k)
        k += 1
    return Ratio(median(ratios), ratios[k - 1], ratios[-k])


def format_ratio(found: Sequence[float] | None) -> str:
    """A :class:`Ratio`, also as read from a result file; empty without one."""
    if found is None:
        return ""
    middle, low, high = found
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least ``percent`` of them do not exceed: with few samples the 99th is the worst."""
    return sorted(samples)[max(0, math.ceil(len(samples) * percent / 100) - 1)]


def bus_factor(op: str, size: int) -> float:
    """busbw = algbw x this, as in nccl-tests: what each link must carry at least, so that all ops and any number of
    ranks meet one hardware limit. ``bytes`` of a reduce-scatter or allgather are the whole's, not a rank's chunk."""
    if op == "broadcast":
        return 1.0
    return (2 if op == "allreduce" else 1) * (size - 1) / size


def parse_bytes(text: str) -> int:
    """``4B``, ``64KiB``, ``1MB``, ``0.5 GB``: K is 1000, Ki is 1024. ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B?)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else ""
    unit = unit if not unit or unit.endswith("B") else unit + "B"
    if match is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is no size; write 4B, 64KiB, 1MB, 100MB")
    return round(float(match[1]) * _UNITS[unit])


def format_bytes(count: int) -> str:
    """The shortest exact writing: 1MB for 1 000 000, 64KiB for 65 536."""
    for unit in ("GB", "GiB", "MB", "MiB", "KB", "KiB"):
        scale = _UNITS[unit.upper()]
        if count >= scale and count % scale == 0:
            return f"{count // scale}{unit}"
    return f"{count}B" if count < 10_000 else f"{count / 1e6:.3f}MB"


def format_us(seconds: float) -> str:
    """Microseconds, to three digits that mean something."""
    us = seconds * 1e6
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"
