"""The data of a collective and its result: numbers that differ per rank and per index, with sums in closed form."""

from __future__ import annotations

from copy import copy

import torch

from commlab.chunks import Range, segments, split
from commlab.errors import UsageError

OPS = ("allreduce", "reduce_scatter", "allgather", "broadcast")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "int64": torch.int64,
}
EXACT_UP_TO = {"float16": 2**11, "bfloat16": 2**8}
"""Up to which integer a 16-bit format, as a dtype or on a wire, holds every integer exactly."""
_UNTOUCHED = -1


class Case:
    """One operation on ``numel`` numbers per rank: the tensors of this rank, and the result that they must give.

    Rank r contributes a(i) + r b(i) at index i, with integers a >= 0 and b >= 1 so small that every partial sum over
    the ranks is at most ``exact_up_to``: any order of adding, rounded or not, must give P a + P (P-1) / 2 b exactly.
    """

    def __init__(self, op: str, numel: int, dtype: torch.dtype, rank: int, size: int, exact_up_to: int = 2**11):
        assert op in OPS
        if size * (size - 1) // 2 > exact_up_to:
            raise UsageError(
                f"{size} ranks are too many to check sums in this precision exactly; leave out the 16-bit dtype or wire"
            )
        if op in ("reduce_scatter", "allgather"):
            numel = -(-numel // size) * size  # equal chunks: not all peers can do others
        self.op, self.dtype, self.rank, self.size = op, dtype, rank, size
        self.bytes = numel * dtype.itemsize
        self._exact_up_to = exact_up_to
        self.own = split(numel, size)[rank]
        self.source = self._numbers(Range(0, numel), 1, 0 if op == "broadcast" else rank)
        """The whole as this rank contributes it; contestants that need an untouched input read it."""
        if op == "broadcast":
            self.expected = self.source
        elif op == "allgather":
            self.expected = torch.cat([self._numbers(own, 1, peer) for peer, own in enumerate(split(numel, size))])
        else:
            result = Range(0, numel) if op == "allreduce" else self.own
            self.expected = self._numbers(result, size, size * (size - 1) // 2)
        self.whole = torch.full_like(self.source, _UNTOUCHED)
        """Input and output of allreduce and broadcast, input of reduce-scatter, output of allgather."""
        self.chunk = self.source[self.own.start : self.own.stop].clone()
        """This rank's share of the whole: output of reduce-scatter, input of allgather."""

    def _numbers(self, indices: Range, factor_a: int, factor_b: int) -> torch.Tensor:
        """factor_a a(i) + factor_b b(i) for ``indices``; a and b have no common period below 2^32."""
        b_count = max(1, self._exact_up_to // self.size**2)
        a_count = 1 + (self._exact_up_to - b_count * self.size * (self.size - 1) // 2) // self.size
        numbers = torch.empty(indices.numel, dtype=self.dtype)
        for piece in segments(indices, 1 << 20):  # so that the 64-bit intermediates stay small
            index = torch.arange(piece.start, piece.stop, dtype=torch.int64)
            a = (index * 2654435761 % 2**32 >> 7) % a_count
            b = 1 + (index * 2246822519 % 2**32 >> 11) % b_count
            numbers[piece.start - indices.start : piece.stop - indices.start] = factor_a * a + factor_b * b
        return numbers

    def within(self, whole: torch.Tensor) -> Case:
        """A case of the same numbers, whose whole lies in the memory of ``whole``."""
        assert whole.dtype == self.dtype and whole.shape == self.whole.shape
        twin = copy(self)
        twin.whole = whole
        return twin

    def fill(self) -> None:
        """Write this rank's input, and numbers that no result may have into the memory of the output."""
        if self.op == "allgather" or (self.op == "broadcast" and self.rank != 0):
            self.whole.fill_(_UNTOUCHED)
        else:
            self.whole.copy_(self.source)
            if self.op == "reduce_scatter":
                self.chunk.fill_(_UNTOUCHED)

    def wrong(self, result: torch.Tensor) -> int:
        """How many numbers of ``result`` differ from the expected ones; all of them where the shape or dtype
        differs."""
        got = result.detach().reshape(-1)
        if got.dtype != self.expected.dtype or got.shape != self.expected.shape:
            return self.expected.numel()
        return int((got != self.expected).sum())
