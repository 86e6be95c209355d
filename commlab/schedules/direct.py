"""Direct: every rank sends each chunk straight to its owner; the owner, having added all of them, sends it back to
everyone.

    reduce-scatter, step s = 1 .. P-1:   rank r sends chunk r+s to rank r+s, adds rank r-s's part to its own chunk r
    allgather,      step s = 1 .. P-1:   rank r sends its chunk r to rank r+s, receives chunk r-s from rank r-s

Cost of an allreduce of n elements: 2 (P-1) steps, no two of which depend on each other within a phase, so a phase costs
one latency; every rank sends 2 n (P-1)/P elements, as the ring does, but to all peers, which crowds a network's switch.
Rounding: all contributions meet at the owner, who adds them in fp32 and divides before it rounds: once, on any wire.
With all elements in one chunk it is the star of a single parameter server.

The shift by s spreads the load: in each step every rank is the target of exactly one peer (R. Thakur, R. Rabenseifner,
W. Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005, pairwise exchange). When to use:
16-bit wires, a few ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..chunks import Range, split
from .step import Schedule, step

owners = split
MEETS_AT_OWNER = True


def reduce_scatter(rank: int, chunks: Sequence[Range]) -> Schedule:
    """After it rank r's chunk r holds the sum over all ranks; its other chunks are untouched."""
    size = len(chunks)
    for shift in range(1, size):
        to, frm = (rank + shift) % size, (rank - shift) % size
        yield from step(to, chunks[to], frm, chunks[rank], reduce=True)


def allgather(rank: int, chunks: Sequence[Range]) -> Schedule:
    """Every rank gets chunk r from rank r."""
    size = len(chunks)
    for shift in range(1, size):
        to, frm = (rank + shift) % size, (rank - shift) % size
        yield from step(to, chunks[rank], frm, chunks[frm])
