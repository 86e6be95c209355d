"""Who owns what of a bucket, where the ranks that train also serve: every bucket is cut into one chunk per rank, and a
rank updates the numbers of its chunk, for all ranks.

    ps     rank 0  [ ........ the bucket ........ ]      rank 1  []       rank 2  []
    dps    rank 0  [ chunk 0 ]      rank 1  [ chunk 1 ]      rank 2  [ chunk 2 ]      whatever the tensors' borders
"""

from __future__ import annotations

from typing import NamedTuple

from ..chunks import Range, split, whole_at
from ..gradients.bucket import Bucket
from ..gradients.parameters import NamedParameter

SERVER = 0
"""The rank that owns everything under ``ps``."""


def one_owner(numel: int, ranks: int) -> tuple[Range, ...]:
    """``ps``: the chunks of a bucket of ``numel`` numbers; all of it is the server's."""
    return whole_at(SERVER, numel, ranks)


def all_owners(numel: int, ranks: int) -> tuple[Range, ...]:
    """``dps``: the chunks of a bucket of ``numel`` numbers, equal ones, cut between cache lines: in the window chunks
    adjoin, and two ranks must not write one line in turn."""
    return split(numel, ranks, align=16)


class Owned(NamedTuple):
    """Numbers ``start .. stop - 1`` of ``parameter`` (flattened), all of them in the chunk of one owner."""

    parameter: NamedParameter
    start: int
    stop: int
    in_chunk: Range
    """Their range in the owner's chunk."""


def owned(bucket: Bucket, chunk: Range) -> list[Owned]:
    """What the owner of ``chunk`` updates of the bucket's parameters, in the bucket's order."""
    found = []
    for member, extent in zip(bucket.parameters, bucket.ranges, strict=True):
        common = extent.intersect(chunk)
        if common.numel:
            in_chunk = Range(common.start - chunk.start, common.stop - chunk.start)
            found.append(Owned(member, common.start - extent.start, common.stop - extent.start, in_chunk))
    return found
