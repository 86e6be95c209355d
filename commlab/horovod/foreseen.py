"""Allreduces that the ranks carry out without an announcement: a training loop asks for the same ones in every step.

Ranks learn from the ticks, which tell all of them the same, what becomes ready before somebody waits for any of it: a
*foreseen batch*. Once such a batch has come together twice in a row, a rank that has been asked for all of it starts
its allreduce at once, under a name that stands for all of its requests. The agreement check of that allreduce, which
travels with it anyway, is the whole negotiation. Where one rank has foreseen what another has not, the check finds that
out before anything is reduced, on all ranks; they announce what they have, as ever, and trust the batch later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from .announced import Ready
from .announcement import Announcement, size_bytes_of
from .submission import Submission

GATHERED_BYTES = 8 * 1024 * 1024
"""From so many bytes on nobody waits for more to travel together."""
_TWICE, _AT_MOST = 2, 64
"""So often a batch comes together, in a row, before it is foreseen; doubled each time that it was foreseen in vain."""
_KNOWN = 4096
"""Of more requests nothing is remembered, and learning begins anew."""


def unnumbered(request: Announcement) -> Announcement:
    """The request as it will come again: without its number, where the caller has chosen no name."""
    return request if request.named else request._replace(name="")


def pattern_of(request: Announcement) -> Announcement | None:
    """:func:`unnumbered`; None for what is never foreseen: what not every rank contributes to, or what is scaled where
    it lies, which can't be done twice."""
    if (
        request.kind != "allreduce"
        or request.op == "adasum"
        or request.absent
        or request.refused
        or request.scales[0] != 1.0
        or len(set(request.dtypes)) != 1
    ):
        return None
    return unnumbered(request)


class ForeseenBatch:
    """Requests that are carried out as one allreduce, in this order."""

    __slots__ = ("here", "name", "patterns", "rooms")

    def __init__(self, patterns: tuple[Announcement, ...]):
        self.patterns = patterns
        self.name = _name_of(patterns) if all(pattern.named for pattern in patterns) else ""
        """What ranks compare; empty where the requests have numbers, which are others each time."""
        self.rooms: Any = None
        """Where its tensors lie in the channel's buffer, once that is known."""
        self.here: dict[Announcement, Submission] = {}
        """Those that this rank has been asked for, by pattern."""


class Promise:
    """A foreseen batch that this rank carries out, of these submissions."""

    __slots__ = ("batch", "kept", "submissions")

    def __init__(self, batch: ForeseenBatch, submissions: Sequence[Submission]):
        self.batch, self.submissions = batch, list(submissions)
        self.kept = False
        """Whether the others have carried it out too. Until then nothing has happened to any tensor."""

    def name(self) -> str:
        """What ranks compare: equal exactly (but for a collision of 64 bits) when all requests are."""
        return self.batch.name or _name_of([submission.request for submission in self.submissions])


def _name_of(requests: Sequence[Announcement]) -> str:
    digest = blake2b(repr([tuple(request) for request in requests]).encode(), digest_size=8).hexdigest()
    more = f" and {len(requests) - 1} more" if len(requests) > 1 else ""
    return f"{requests[0].name}{more}, foreseen ({digest})"


class _Forming(NamedTuple):
    patterns: list[Announcement]
    size_bytes: int


class Foreseen:
    """What one process set has learned: the same on all of its ranks, because it follows from what all have heard."""

    def __init__(self, fusion_bytes: int):
        """``fusion_bytes``: the most that travels together."""
        self._fusion_bytes = fusion_bytes
        self.batches: dict[Announcement, ForeseenBatch] = {}
        """By pattern."""
        self._forming: dict[Any, _Forming] = {}
        """What has become ready since somebody waited, by what travels in one allreduce."""
        self._came: dict[Announcement, tuple[tuple[Announcement, ...], int]] = {}
        """By pattern: with which others it came last, and how often in a row."""
        self._in_vain: dict[Announcement, int] = {}

    def learn(self, ready: Iterable[Ready], size: int) -> bool:
        """Enter what one tick has made ready on ``size`` ranks. Whether what is foreseen has changed."""
        if len(self._came) > _KNOWN:
            self.batches.clear()
            self._came.clear()
            self._in_vain.clear()
        changed = False
        for each in ready:
            if each.anew:
                for key in list(self._forming):
                    changed |= self._close(key)
            pattern = pattern_of(each.request)
            if pattern is None or len(each.requests) < size or len(set(each.requests.values())) > 1:
                continue
            key = pattern.dtypes[0], pattern.op, pattern.scales
            forming = self._forming.get(key, _Forming([], 0))
            size_bytes = size_bytes_of(pattern.dtypes, pattern.shapes)
            if pattern in forming.patterns or forming.size_bytes + size_bytes > self._fusion_bytes:
                changed |= self._close(key)
                forming = _Forming([], 0)
            forming.patterns.append(pattern)
            self._forming[key] = forming = _Forming(forming.patterns, forming.size_bytes + size_bytes)
            if forming.size_bytes >= GATHERED_BYTES:
                changed |= self._close(key)
        return changed

    def _close(self, key: Any) -> bool:
        forming = self._forming.pop(key, None)
        if forming is None or not forming.patterns:
            return False
        patterns = tuple(forming.patterns)
        before, times = self._came.get(patterns[0], ((), 0))
        times = times + 1 if before == patterns else 1
        changed = False
        for pattern in patterns:
            self._came[pattern] = patterns, times
            known = self.batches.get(pattern)
            if known is not None and known.patterns != patterns:
                self._forget(known)
                changed = True
        in_vain = max(self._in_vain.get(pattern, 0) for pattern in patterns)
        if times >= min(_TWICE << in_vain, _AT_MOST) and patterns[0] not in self.batches:
            batch = ForeseenBatch(patterns)
            self.batches.update(dict.fromkeys(patterns, batch))
            changed = True
        return changed

    def missed(self, pattern: Announcement) -> bool:
        """A rank has foreseen the batch of ``pattern`` in vain. Whether what is foreseen has changed."""
        batch = self.batches.get(pattern)
        if batch is None:
            return False
        self._forget(batch)
        for each in batch.patterns:
            self._in_vain[each] = min(self._in_vain.get(each, 0) + 1, 8)
            self._came.pop(each, None)
        return True

    def _forget(self, batch: ForeseenBatch) -> None:
        for pattern in batch.patterns:
            self.batches.pop(pattern, None)
