"""The operations, each composed from an algorithm's two halves: a reduce-scatter to the chunks' owners, an allgather
from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..chunks import Range, whole_at
from .step import Finish, Schedule


class Algorithm(Protocol):
    """What a module of this folder offers. Chunks adjoin, cover the buffer, and may be empty or of any size."""

    def owners(self, numel: int, size: int) -> tuple[Range, ...]:
        """The chunks that suit the algorithm best when nobody asks for certain ones."""

    def reduce_scatter(self, rank: int, chunks: Sequence[Range]) -> Schedule: ...

    def allgather(self, rank: int, chunks: Sequence[Range]) -> Schedule: ...


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
