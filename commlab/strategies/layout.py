"""Where the parameters of ``ps`` and ``dps`` lie, and what of them each rank owns: what one plan lays out.

Parameters become views of flat buffers, one per bucket, which in the window exist once for all ranks. Each bucket is
cut into chunks, one per owner (:mod:`.owners`), and an owner updates the pieces of parameters that its chunks hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..checkpoint.pieces import Piece
from ..chunks import Range
from ..gradients.bucket import Bucket
from .flat import FlatParameters, memory_of_rank_0
from .owners import Owned, owned
from .start import Training, pin_flats

Owners = Callable[[int, int], tuple[Range, ...]]
"""``owners(numel, ranks)``: who owns what of a bucket of ``numel`` numbers, a chunk for each rank."""


class Layout:
    """The chunks, the flat buffers and this rank's pieces of ``buckets``. Moves the parameters. Collective."""

    def __init__(self, training: Training, buckets: Sequence[Bucket], owners: Owners):
        self._training, holders = training, training.holders
        self.chunks = [owners(bucket.numel, holders.size) for bucket in buckets]
        """Of each bucket: who owns what."""
        self.owned: list[list[Owned]] = [
            owned(bucket, chunks[holders.rank]) for bucket, chunks in zip(buckets, self.chunks, strict=True)
        ]
        """Of each bucket: what this rank updates."""
        self.flats = [self._flatten(bucket) for bucket in buckets]
        """Of each bucket: where its parameters lie."""
        if any(each.mirror is not None for each in self.flats):
            pin_flats(training, [each.host for each in self.flats])

    def _flatten(self, bucket: Bucket) -> FlatParameters:
        """Move a bucket's parameters into a flat buffer; in the window, into the one buffer of all ranks."""
        dtype, training = bucket.parameters[0].tensor.dtype, self._training
        if not training.in_window:
            return FlatParameters(bucket, torch.empty(bucket.numel, dtype=dtype, device="cpu"))
        host = memory_of_rank_0(training.sharers, bucket.numel, dtype)
        return FlatParameters(bucket, host, fill=training.sharers.rank == 0)

    def pieces(self) -> list[Piece]:
        """What this rank updates, as views of the flat buffers; in the order of buckets and of their parameters."""
        pieces = []
        for each, chunks, mine in zip(self.flats, self.chunks, self.owned, strict=True):
            own = chunks[self._training.holders.rank]
            chunk = each.flat[own.start : own.stop]
            for item in mine:
                tensor = chunk[item.in_chunk.start : item.in_chunk.stop]
                if not item.parameter.tensor.dim():
                    # So that its state has no dimension either, like that of the whole.
                    tensor = tensor.view(())
                pieces.append(Piece(item.parameter, item.start, item.stop, tensor))
        return pieces

    @property
    def one_copy(self) -> bool:
        """Whether the parameters exist once for all ranks that share memory."""
        return self._training.in_window and all(each.mirror is None for each in self.flats)

    @property
    def shared(self) -> list[FlatParameters]:
        """The buffers that all ranks which share memory see."""
        return self.flats if self.one_copy else []
