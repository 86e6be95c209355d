"""Binomial tree: sums climb to the root, the result climbs down; a rank is busy only log2 P times.

    reduce to 0, P = 8:   step 0   1 -> 0   3 -> 2   5 -> 4   7 -> 6        broadcast: the same arrows backwards
                          step 1   2 -> 0            6 -> 4
                          step 2   4 -> 0

Cost of an allreduce of n elements: 2 ceil(log2 P) steps; a rank sends n once on the way up, and at most n ceil(log2 P)
on the way down (the root). Few, large messages: good for latency, poor for bandwidth; segments fill the tree as a
pipeline. Rounding: at most ceil(log2 P) additions on each path; a 16-bit wire rounds at each. With one chunk per rank
(reduce-scatter, allgather) the tree ends in a scatter from, or begins with a gather to, the root: the chunks of a
subtree adjoin.

R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.
When to use: small messages, many ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..chunks import EMPTY, Range, span, whole_at
from .step import Schedule, Step

MEETS_AT_OWNER = False


def owners(numel: int, size: int) -> tuple[Range, ...]:
    """The root does all the finishing of an allreduce, so it owns everything."""
    return whole_at(0, numel, size)


def root_of(chunks: Sequence[Range]) -> int:
    """The rank with the largest chunk (the first of them): what is already at the root need not travel."""
    return max(range(len(chunks)), key=lambda rank: chunks[rank].numel)


def edges(rank: int, root: int, size: int) -> tuple[int | None, list[int]]:
    """Parent of ``rank`` (None: it is the root) and its children, nearest (smallest subtree) first.

    In ranks counted from the root, the parent is the rank with its lowest set bit cleared.
    """
    offset = (rank - root) % size
    children, bit = [], 1
    while bit < size and not offset & bit:
        if offset + bit < size:
            children.append((offset + bit + root) % size)
        bit *= 2
    return (None if offset == 0 else (offset - bit + root) % size), children


def _subtree(rank: int, root: int, chunks: Sequence[Range]) -> Iterator[Range]:
    """What the ranks below and including ``rank`` own: one range, or two where the subtree wraps round past the last
    rank."""
    size = len(chunks)
    offset = (rank - root) % size
    height = offset & -offset
    count = min(height, size - offset)
    first, last = rank, rank + count
    for low, high in ((first, min(last, size)), (0, last - size)):
        if high > low and span(chunks, low, high).numel:
            yield span(chunks, low, high)


def reduce_scatter(rank: int, chunks: Sequence[Range]) -> Schedule:
    """Sums everything to the root, which then hands every rank its own chunk down the tree."""
    root = root_of(chunks)
    parent, children = edges(rank, root, len(chunks))
    everything = span(chunks, 0, len(chunks))
    if not everything.numel:
        return
    for child in children:
        yield Step(None, EMPTY, child, everything, reduce=True)
    if parent is not None:
        yield Step(parent, everything, None, EMPTY)
        for owned in _subtree(rank, root, chunks):
            yield Step(None, EMPTY, parent, owned)
    for child in reversed(children):
        for owned in _subtree(child, root, chunks):
            yield Step(child, owned, None, EMPTY)


def allgather(rank: int, chunks: Sequence[Range]) -> Schedule:
    """Gathers every chunk at the root, which broadcasts them all; with everything at the root it is a broadcast."""
    root = root_of(chunks)
    parent, children = edges(rank, root, len(chunks))
    everything = span(chunks, 0, len(chunks))
    if not everything.numel:
        return
    for child in children:
        for owned in _subtree(child, root, chunks):
            yield Step(None, EMPTY, child, owned)
    if parent is not None:
        for owned in _subtree(rank, root, chunks):
            yield Step(parent, owned, None, EMPTY)
        yield Step(None, EMPTY, parent, everything)
    for child in reversed(children):
        yield Step(child, everything, None, EMPTY)
