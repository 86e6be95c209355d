"""Measures contestants against each other: interleaved by round, in a new order every round, each result checked.

The machines are shared and noisy, so a ratio within a round counts and an absolute time does not. A sample is the
longest time that any rank took from a common barrier on; short operations are repeated until it lasts
MIN_SAMPLE_S, or as long as the caller wants it.
"""

from __future__ import annotations

import faulthandler
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

from .errors import BenchError
from .ranks import Ranks

MIN_SAMPLE_S = 2e-3
MAX_REPEATS = 1000


class ContestantMissing(BenchError):
    """A contestant cannot take part here; the message says why, and becomes the contestant's record."""


def _nothing() -> None:
    pass


@dataclass
class Contestant:
    """One way to do the work.

    ``work`` does the work once; its result goes to ``wrong``. ``fill`` puts the input back, before every sample and
    outside the timing. ``wrong`` counts the numbers of this rank's result that differ from the right ones. ``labels``
    are columns that describe the contestant. ``bytes_sent`` reads a counter of the bytes that this rank has sent, where
    there is one.
    """

    name: str
    work: Callable[[], Any]
    fill: Callable[[], Any]
    wrong: Callable[[Any], int]
    labels: dict[str, Any] = field(default_factory=dict)
    bytes_sent: Callable[[], int] | None = None


@dataclass
class Block:
    """Contestants that are measured one after the other in a round, between ``start`` and ``stop``, which are not
    timed.

    ``disturbs``: the contestants are stopped because their threads would slow the others down; they are warmed up in
    every round.
    """

    contestants: list[Contestant]
    start: Callable[[], Any] = _nothing
    stop: Callable[[], Any] = _nothing
    disturbs: bool = False


def missing(name: str, reason: str, **labels: Any) -> Block:
    """A contestant that is not there; its record says why."""

    def refuse() -> None:
        raise ContestantMissing(reason)

    return Block([Contestant(name, refuse, _nothing, lambda _: 0, labels)], start=refuse)


@dataclass
class Result:
    """The measurements of one contestant: a sample per round, in seconds; or ``missing``, the reason why there are
    none."""

    contestant: Contestant
    samples_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """What a call took of all ranks' cores, user and system time, per round."""
    wrong: int = 0
    repeats: int = 1
    bytes_sent: int | None = None
    missing: str = ""


def measure(
    blocks: Sequence[Block],
    ranks: Ranks,
    rounds: int,
    seed: int = 0,
    timeout_s: float = 300.0,
    progress: Callable[[str], None] = lambda _: None,
    sample_s: float = MIN_SAMPLE_S,
) -> list[Result]:
    """Measure all contestants in every round; results in their order. Collective. A sample lasts ``sample_s`` or
    longer.

    A contestant that raises ContestantMissing in its warm-up drops out on all ranks. A block that takes longer than
    ``timeout_s`` in one round prints where every thread stands and ends this process, and with it the job.
    """
    results = {id(each): Result(each) for block in blocks for each in block.contestants}
    order = random.Random(seed)
    for round_ in range(-1, rounds):
        shuffled = list(blocks)
        order.shuffle(shuffled)
        for block in shuffled:
            playing = [results[id(each)] for each in block.contestants if not results[id(each)].missing]
            if not playing:
                continue
            progress(f"round {max(0, round_) + 1} of {rounds}: {playing[0].contestant.name}")
            faulthandler.dump_traceback_later(timeout_s, exit=True)
            reason = _on_all(ranks, block.start)
            for result in playing:
                if reason or round_ < 0:
                    result.missing = reason or _warm_up(result, ranks, sample_s)
                else:
                    _sample(result, ranks, warm=block.disturbs)
            block.stop()
            faulthandler.cancel_dump_traceback_later()
    progress("")
    for result in results.values():
        if not result.missing:
            result.samples_s = ranks.maximum(result.samples_s)
            result.cpu_s = ranks.total(result.cpu_s)
            result.wrong = int(ranks.total([result.wrong])[0])
    return list(results.values())


def _on_all(ranks: Ranks, call: Callable[[], Any]) -> str:
    """Make the call on every rank; returns why some rank cannot make it, or an empty text. Collective."""
    reason = ""
    try:
        call()
    except ContestantMissing as missing_here:
        reason = str(missing_here)
    return ranks.first(reason)


def _warm_up(result: Result, ranks: Ranks, sample_s: float) -> str:
    """Do the work for the first time, which makes all that is made on first use; find out how often a sample must
    repeat the work, and how many bytes are sent. Returns why the contestant cannot take part, or an empty text."""
    contestant = result.contestant
    contestant.fill()
    reason = _on_all(ranks, contestant.work)
    if reason:
        return reason
    before = contestant.bytes_sent() if contestant.bytes_sent else 0
    spent_s, calls = 0.0, 0
    while spent_s < sample_s and calls < MAX_REPEATS:
        batch = max(1, calls)
        spent_s += ranks.maximum([_timed(contestant, ranks, batch).spent_s])[0]
        calls += batch
    if contestant.bytes_sent:
        result.bytes_sent = int(ranks.maximum([(contestant.bytes_sent() - before) / calls])[0])
    result.repeats = min(MAX_REPEATS, max(1, -int(-sample_s * calls // spent_s)))
    return ""


def _sample(result: Result, ranks: Ranks, warm: bool) -> None:
    contestant = result.contestant
    contestant.fill()
    if warm:
        contestant.work()
        contestant.fill()
    spent_s, cpu_s, value = _timed(contestant, ranks, result.repeats)
    if result.repeats > 1:  # repeated in place, the sums are no longer those of one call
        contestant.fill()
        ranks.barrier()
        value = contestant.work()
    result.samples_s.append(spent_s / result.repeats)
    result.cpu_s.append(cpu_s / result.repeats)
    result.wrong += contestant.wrong(value)


class _Timed(NamedTuple):
    """Calls of the work on this rank: how long they took, what of the cores, and the last one's value."""

    spent_s: float
    cpu_s: float
    value: Any


def _timed(contestant: Contestant, ranks: Ranks, repeats: int) -> _Timed:
    work, value = contestant.work, None
    ranks.barrier()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for _ in repeat(None, repeats):
        value = work()
    spent_s = time.perf_counter() - start_s
    return _Timed(spent_s, time.process_time() - start_cpu_s, value)


def progress_line(ranks: Ranks, head: str) -> Callable[[str], None]:
    """Shows ``head`` and a text on stderr, on rank 0: one line, replaced on a terminal; elsewhere a new one every 30 s.
    An empty text ends it."""
    shown_s = time.monotonic()

    def show(text: str) -> None:
        nonlocal shown_s
        if ranks.rank:
            return
        now_s = time.monotonic()
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{head}: {text}" if text else "\r\x1b[K")
        elif text and now_s - shown_s > 30:
            shown_s = now_s
            sys.stderr.write(f"{head}: {text}\n")
        sys.stderr.flush()

    return show
