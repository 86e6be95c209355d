"""The words for operations that some ranks do not announce: which, for how long, and whom they wait for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from .settings import Settings

log = logging.getLogger("commlab")


class Stalls:
    """Who looks, now and then, how long one rank's operations have waited."""

    def __init__(self, rank: int, settings: Settings):
        self._rank, self._settings = rank, settings
        self._warned_s: float | None = None

    def inspect(
        self,
        now_s: float,
        waited: Mapping[str, float],
        lacking: Callable[[str], Sequence[int] | None],
        silent: Callable[[], Sequence[int]],
    ) -> str:
        """Warn of operations that some ranks do not announce, with the ranks. Returns why this rank is to give up, once
        one of them has waited too long; else nothing. ``waited``: for how many seconds each has waited; ``lacking``:
        which ranks have not announced it, None where nobody has answered; ``silent``: who has not answered."""
        settings, longest_s = self._settings, max(waited.values(), default=0.0)
        if not waited:
            self._warned_s = None
        if longest_s <= min(settings.timeout_s, settings.warn_s):
            return ""
        gives_up = longest_s > settings.timeout_s
        if not gives_up and self._warned_s is not None and now_s - self._warned_s <= settings.warn_s:
            return ""
        limit_s = min(settings.warn_s, settings.timeout_s) / 2
        waiting = {name: waited_s for name, waited_s in waited.items() if waited_s >= limit_s}
        answered = {name: ranks for name in waiting if (ranks := lacking(name)) is not None}
        words = stalled_words(waiting, answered, silent())
        if gives_up:
            return words
        self._warned_s = now_s
        log.warning("rank %d: %s", self._rank, words)
        return ""


def stalled_words(waiting: Mapping[str, float], lacking: Mapping[str, Sequence[int]], silent: Sequence[int]) -> str:
    """``waiting``: for how many seconds each operation has waited; ``lacking``: which ranks have not announced it, of
    those that this rank has announced itself and the others have answered; ``silent``: who has not answered."""
    by_ranks: dict[tuple[int, ...], list[str]] = {}
    for name, _ in sorted(waiting.items(), key=lambda item: -item[1]):
        by_ranks.setdefault(tuple(lacking.get(name) or silent), []).append(name)
    texts = [f"{_listed(names)}: {_ranks(ranks)} not" for ranks, names in by_ranks.items()]
    return (
        f"has waited {max(waiting.values(), default=0.0):.1f} s for ranks that have not announced these operations: "
        f"{'; '.join(texts)}. Every rank must call the same operations by the same names: see its own output"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{', '.join(map(repr, names[:8]))}{more}"


def _ranks(ranks: Iterable[int]) -> str:
    numbers = [str(rank) for rank in ranks]
    if not numbers:
        return "other ranks have"
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers)} {'have' if len(numbers) > 1 else 'has'}"
