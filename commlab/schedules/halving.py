"""Recursive halving and doubling: in each step swap half of what is left with a partner; log2 P steps at the ring's
bytes.

    reduce-scatter, P = 4      rank 0    rank 1    rank 2    rank 3
    distance 2                 0 <-> 2             1 <-> 3             halves:   0,1 keep the first, 2,3 the second
    distance 1                 0 <-> 1             2 <-> 3             quarters: rank r keeps quarter r
    allgather                  the same partners, backwards, doubling what each one has

Any number of ranks: with F = P - 2^floor(log2 P) ranks too many, the first 2 F ranks pair up (0,1) (2,3) ..; the even
one hands its contribution to the odd one, stands aside, and gets its part of the result at the end.

Cost of an allreduce of n elements: 2 floor(log2 P) steps and 2 n (Q-1)/Q elements per rank, Q = 2^floor(log2 P); where
F > 0, 2 steps more, and of each pair the odd rank sends n more, the even one n in all.
Rounding: floor(log2 P) (+1) additions, in the same order on all ranks; a 16-bit wire rounds at each.

R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.
When to use: middle-sized messages, where the number of steps matters, above all on a power of two of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..chunks import EMPTY, Range, span, split
from .step import Schedule, Step, step

MEETS_AT_OWNER = False


@dataclass(frozen=True)
class Fold:
    """``size`` ranks on 2^k positions: the first ``folded`` positions hold two ranks each, the odd one of which is
    active."""

    size: int

    @property
    def positions(self) -> int:
        return 1 << (self.size.bit_length() - 1)

    @property
    def folded(self) -> int:
        return self.size - self.positions

    def active(self, position: int) -> int:
        """The rank that works at ``position``."""
        return 2 * position + 1 if position < self.folded else position + self.folded

    def position(self, rank: int) -> int:
        return rank // 2 if rank < 2 * self.folded else rank - self.folded

    def partner(self, rank: int) -> int | None:
        """The other rank of a folded pair."""
        return rank ^ 1 if rank < 2 * self.folded else None

    def range(self, chunks: Sequence[Range], first: int, last: int) -> Range:
        """What the ranks at positions ``first .. last - 1`` own together."""
        low = 2 * first if first < self.folded else first + self.folded
        high = 2 * last if last <= self.folded else last + self.folded
        return span(chunks, low, high)

    def halvings(self, position: int) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
        """(partner's position, positions to give away, positions to keep), from the largest halving to the smallest."""
        low, high = 0, self.positions
        while high - low > 1:
            middle = (low + high) // 2
            halves = (low, middle), (middle, high)
            keep, give = halves if position < middle else halves[::-1]
            yield position ^ (middle - low), give, keep
            low, high = keep


def owners(numel: int, size: int) -> tuple[Range, ...]:
    """Ranks that stand aside own nothing, so that an allreduce need not visit them in the middle."""
    fold = Fold(size)
    shares = iter(split(numel, fold.positions))
    chunks, at = [], 0
    for rank in range(size):
        active = fold.active(fold.position(rank)) == rank
        chunks.append(next(shares) if active else Range(at, at))
        at = chunks[-1].stop
    return tuple(chunks)


def reduce_scatter(rank: int, chunks: Sequence[Range]) -> Schedule:
    """After it rank r's chunk r holds the sum over all ranks; the other chunks hold partial sums, of no use."""
    fold = Fold(len(chunks))
    everything = span(chunks, 0, len(chunks))
    position, partner = fold.position(rank), fold.partner(rank)
    if not everything.numel:
        return
    if rank != fold.active(position):
        assert partner is not None
        yield Step(partner, everything, None, EMPTY)
        yield from step(partner, EMPTY, partner, chunks[rank])
        return
    if partner is not None:
        yield Step(None, EMPTY, partner, everything, reduce=True)
    for other, give, keep in fold.halvings(position):
        peer = fold.active(other)
        yield from step(peer, fold.range(chunks, *give), peer, fold.range(chunks, *keep), reduce=True)
    if partner is not None:
        yield from step(partner, chunks[partner], partner, EMPTY)


def allgather(rank: int, chunks: Sequence[Range]) -> Schedule:
    """Every rank gets chunk r from rank r."""
    fold = Fold(len(chunks))
    everything = span(chunks, 0, len(chunks))
    position, partner = fold.position(rank), fold.partner(rank)
    if not everything.numel:
        return
    if rank != fold.active(position):
        assert partner is not None
        yield from step(partner, chunks[rank], partner, EMPTY)
        yield Step(None, EMPTY, partner, everything)
        return
    if partner is not None:
        yield from step(partner, EMPTY, partner, chunks[partner])
    for other, give, keep in reversed(list(fold.halvings(position))):
        peer = fold.active(other)
        yield from step(peer, fold.range(chunks, *keep), peer, fold.range(chunks, *give))
    if partner is not None:
        yield Step(partner, everything, None, EMPTY)
