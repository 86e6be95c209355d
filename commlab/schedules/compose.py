"""The operations, each composed from an algorithm's two halves: a reduce-scatter to the chunks' owners, an allgather
from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..chunks import Range, whole_at
from .step import Finish, Schedule


class Algorithm(Protocol):
    """What a module of this folder offers. Chunks adjoin, cover the buffer, and may be empty or of any size."""

    MEETS_AT_OWNER: bool
    """Whether all contributions to a chunk arrive at its owner as they left their ranks. Then the owner can add 16-bit
    numbers in fp32 and round once; elsewhere partial sums travel, and a 16-bit wire rounds at every hop."""

    def owners(self, numel: int, size: int) -> tuple[Range, ...]:
        """The chunks that suit the algorithm best when nobody asks for certain ones: one for each of ``size`` ranks."""

    def reduce_scatter(self, rank: int, chunks: Sequence[Range]) -> Schedule:
        """The steps of ``rank`` after which its own chunk holds the sum over all ranks."""

    def allgather(self, rank: int, chunks: Sequence[Range]) -> Schedule:
        """The steps of ``rank`` after which all chunks hold what their owners had in them."""


def allreduce(algorithm: Algorithm, rank: int, size: int, numel: int) -> Schedule:
    """Every rank ends with the sum of all ranks' buffers."""
    chunks = algorithm.owners(numel, size)
    yield from reduce_scatter(algorithm, rank, chunks)
    yield from algorithm.allgather(rank, chunks)


def reduce_scatter(algorithm: Algorithm, rank: int, chunks: Sequence[Range]) -> Schedule:
    """Rank r ends with the sum of all ranks' chunk r."""
    yield from algorithm.reduce_scatter(rank, chunks)
    yield Finish(chunks[rank])


def allgather(algorithm: Algorithm, rank: int, chunks: Sequence[Range]) -> Schedule:
    """Every rank ends with chunk r of rank r, for all r."""
    yield from algorithm.allgather(rank, chunks)


def reduce(algorithm: Algorithm, rank: int, size: int, numel: int, root: int) -> Schedule:
    """``root`` ends with the sum of all ranks' buffers; the others' buffers are used up."""
    yield from reduce_scatter(algorithm, rank, whole_at(root, numel, size))


def broadcast(algorithm: Algorithm, rank: int, size: int, numel: int, root: int) -> Schedule:
    """Every rank ends with ``root``'s buffer."""
    yield from allgather(algorithm, rank, whole_at(root, numel, size))
