"""Offset arithmetic: the one home of every split of a buffer into chunks, segments and shards.

buffer > bucket > chunk > segment: a bucket is cut into one chunk per rank, a chunk into segments, the unit in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple


class Range(NamedTuple):
    """Half-open range ``[start, stop)`` of elements of a flat buffer."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: Range) -> bool:
        return self.start < other.stop and other.start < self.stop

    def intersect(self, other: Range) -> Range:
        """The common part; empty (``start == stop``) where there is none."""
        start = max(self.start, other.start)
        return Range(start, max(start, min(self.stop, other.stop)))


EMPTY = Range(0, 0)


@lru_cache(1024)
def split(numel: int, parts: int, align: int = 1) -> tuple[Range, ...]:
    """Cut ``[0, numel)`` into ``parts`` adjoining chunks whose sizes differ by at most one unit of ``align`` elements.

    Every boundary is a multiple of ``align`` (or ``numel``, when the last unit is ragged); the first chunks are the
    longer ones; chunks may be empty.
    """
    short, longer = divmod(-(-numel // align), parts)
    bounds, start = [], 0
    for index in range(parts):
        stop = min(numel, start + (short + (index < longer)) * align)
        bounds.append(Range(start, stop))
        start = stop
    return tuple(bounds)


@lru_cache(1024)
def whole_at(owner: int, numel: int, parts: int) -> tuple[Range, ...]:
    """Chunks of which ``owner`` has everything and the others nothing: with these a reduce-scatter is a reduce to
    ``owner``, and an allgather is a broadcast from it."""
    return tuple(
        Range(0, 0 if part < owner else numel) if part <= owner else Range(numel, numel) for part in range(parts)
    )


def adjoining(sizes: Iterable[int]) -> tuple[Range, ...]:
    """Ranges of these sizes, one behind the other."""
    bounds = list(accumulate(sizes, initial=0))
    return tuple(Range(start, stop) for start, stop in pairwise(bounds))


def segments(chunk: Range, segment_numel: int) -> list[Range]:
    """Cut a chunk into segments of at most ``segment_numel`` elements, in order; an empty chunk has none."""
    start, stop = chunk
    if stop - start <= segment_numel:
        return [chunk] if stop > start else []
    return [Range(at, min(at + segment_numel, stop)) for at in range(start, stop, segment_numel)]


def span(chunks: Sequence[Range], first: int, last: int) -> Range:
    """The range covered by the adjoining chunks ``first .. last - 1``."""
    return Range(chunks[first].start, chunks[last - 1].stop)
