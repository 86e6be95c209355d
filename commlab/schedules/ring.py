"""Ring: every rank talks to its two neighbours only, and all links carry the same load all the time.

    reduce-scatter, P = 4                 allgather
    step 0   0 -> 1 -> 2 -> 3 -> 0        the same way round, with the finished chunks
             (chunk 3 leaves rank 0, 0 leaves 1, 1 leaves 2, 2 leaves 3)
    step s   rank r sends chunk r-1-s, adds what it receives to chunk r-2-s
    last     rank r adds the last contribution to its own chunk r

Cost of an allreduce of n elements: 2 (P-1) steps; every rank sends 2 n (P-1)/P elements, the least that any algorithm
can. Rounding: P-1 additions in ring order, a different order for every chunk, the same on all ranks; a 16-bit wire
rounds at each. With all elements in one chunk (:func:`commlab.chunks.whole_at`) it is a pipelined chain: reduce to, or
broadcast from, one rank.

P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009.
When to use: large messages, and slow links between nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..chunks import Range, split
from .step import Schedule, step

owners = split
MEETS_AT_OWNER = False


def reduce_scatter(rank: int, chunks: Sequence[Range]) -> Schedule:
    """After it rank r's chunk r holds the sum over all ranks; the other chunks hold partial sums, of no use."""
    size = len(chunks)
    right, left = (rank + 1) % size, (rank - 1) % size
    for at in range(size - 1):
        yield from step(right, chunks[(rank - 1 - at) % size], left, chunks[(rank - 2 - at) % size], reduce=True)


def allgather(rank: int, chunks: Sequence[Range]) -> Schedule:
    """Every rank gets chunk r from rank r."""
    size = len(chunks)
    right, left = (rank + 1) % size, (rank - 1) % size
    for at in range(size - 1):
        yield from step(right, chunks[(rank - at) % size], left, chunks[(rank - 1 - at) % size])
