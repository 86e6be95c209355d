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
from typing import Any

from .ranks import Ranks

MIN_SAMPLE_S = 2e-3
MAX_REPEATS = 1000


class Unavailable(RuntimeError):
    """A contestant cannot take part here; the message says why, and becomes its row."""


def _nothing() -> None:
    pass


@dataclass
class Contestant:
    """One way to do the work.

    ``run``: the work, once; what it returns goes to ``wrong``. ``fill``: puts the input back, before every sample,
    outside the timing. ``wrong``: how many numbers of this rank's result are not what they must be. ``labels``: columns
    that say what it is. ``bytes_sent``: a counter of what this rank has sent, where there is one.
    """

    name: str
    run: Callable[[], Any]
    fill: Callable[[], Any]
    wrong: Callable[[Any], int]
    labels: dict[str, Any] = field(default_factory=dict)
    bytes_sent: Callable[[], int] | None = None


@dataclass
class Block:
    """Contestants that take their turn of a round together, between ``start`` and ``stop``, which are not timed.

    ``disturbs``: they are stopped because threads of theirs would slow the others; so each turn begins with a warm-up.
    """

    contestants: list[Contestant]
    start: Callable[[], Any] = _nothing
    stop: Callable[[], Any] = _nothing
    disturbs: bool = False


def missing(name: str, reason: str, **labels: Any) -> Block:
    """A contestant that is not there: its row says why."""

    def refuse() -> None:
        raise Unavailable(reason)

    return Block([Contestant(name, refuse, _nothing, lambda _: 0, labels)], start=refuse)


@dataclass
class Result:
    """What one contestant did: a sample per round, in seconds per run; or ``missing``, why there are none."""

    contestant: Contestant
    samples_s: list[float] = field(default_factory=list)
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
    """Run all contestants ``rounds`` times; results in their order. Collective. A sample lasts ``sample_s`` or longer.

    A contestant that raises Unavailable in its first run drops out on all ranks. A turn that takes longer than
    ``timeout_s`` prints where every thread stands and ends this process, and with it the job.
    """
    results = {id(each): Result(each) for block in blocks for each in block.contestants}
    order = random.Random(seed)
    for turn in range(-1, rounds):
        shuffled = list(blocks)
        order.shuffle(shuffled)
        for block in shuffled:
            playing = [results[id(each)] for each in block.contestants if not results[id(each)].missing]
            if not playing:
                continue
            progress(f"round {max(0, turn) + 1} of {rounds}: {playing[0].contestant.name}")
            faulthandler.dump_traceback_later(timeout_s, exit=True)
            reason = _on_all(ranks, block.start)
            for result in playing:
                if reason or turn < 0:
                    result.missing = reason or _first_run(result, ranks, sample_s)
                else:
                    _sample(result, ranks, warm=block.disturbs)
            block.stop()
            faulthandler.cancel_dump_traceback_later()
    progress("")
    for result in results.values():
        if not result.missing:
            result.samples_s = ranks.maximum(result.samples_s)
            result.wrong = int(ranks.total([result.wrong])[0])
    return list(results.values())


def _on_all(ranks: Ranks, call: Callable[[], Any]) -> str:
    """Do it; why some rank cannot, or ''. Collective."""
    reason = ""
    try:
        call()
    except Unavailable as unavailable:
        reason = str(unavailable)
    return ranks.first(reason)


def _first_run(result: Result, ranks: Ranks, sample_s: float) -> str:
    """Warm up: what is made on first use is made here. Finds out how often a sample must repeat, and what is sent."""
    contestant = result.contestant
    contestant.fill()
    reason = _on_all(ranks, contestant.run)
    if reason:
        return reason
    before = contestant.bytes_sent() if contestant.bytes_sent else 0
    spent_s, runs = 0.0, 0
    while spent_s < sample_s and runs < MAX_REPEATS:
        batch = max(1, runs)
        spent_s += ranks.maximum([_timed(contestant, ranks, batch)[0]])[0]
        runs += batch
    if contestant.bytes_sent:
        result.bytes_sent = int(ranks.maximum([(contestant.bytes_sent() - before) / runs])[0])
    result.repeats = min(MAX_REPEATS, max(1, -int(-sample_s * runs // spent_s)))
    return ""


def _sample(result: Result, ranks: Ranks, warm: bool) -> None:
    contestant = result.contestant
    contestant.fill()
    if warm:
        contestant.run()
        contestant.fill()
    spent_s, value = _timed(contestant, ranks, result.repeats)
    if result.repeats > 1:  # repeated in place, the sums are no longer those of one run
        contestant.fill()
        ranks.barrier()
        value = contestant.run()
    result.samples_s.append(spent_s / result.repeats)
    result.wrong += contestant.wrong(value)


def _timed(contestant: Contestant, ranks: Ranks, repeats: int) -> tuple[float, Any]:
    run, value = contestant.run, None
    ranks.barrier()
    start_s = time.perf_counter()
    for _ in repeat(None, repeats):
        value = run()
    return time.perf_counter() - start_s, value


def progress_line(ranks: Ranks, head: str) -> Callable[[str], None]:
    """Shows ``head`` and a text on stderr, on rank 0: one line, replaced on a terminal; elsewhere a new one every 30 s.
    An empty text ends it."""
    said_s = time.monotonic()

    def show(text: str) -> None:
        nonlocal said_s
        if ranks.rank:
            return
        now_s = time.monotonic()
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{head}: {text}" if text else "\r\x1b[K")
        elif text and now_s - said_s > 30:
            said_s = now_s
            sys.stderr.write(f"{head}: {text}\n")
        sys.stderr.flush()

    return show
