"""Parameters in flat buffers, one per bucket, so that a pull writes them where they are used."""

from __future__ import annotations

import struct

import torch

from ..gradients.bucket import Bucket, own_storage
from ..gradients.mirror import Mirror, mirrors
from ..runtime.control import exchange_records
from ..runtime.group import Group
from ..window.area import Place
from .start import Training


class FlatParameters:
    """The parameters of a bucket, which are given the memory of one flat buffer, in the bucket's order. ``host``: that
    buffer, or where the parameters are on a GPU its mirror in the host's memory; 1-D, of the parameters' dtype.
    ``fill``: write the parameters there first."""

    def __init__(self, bucket: Bucket, host: torch.Tensor, *, fill: bool = True):
        device = bucket.parameters[0].tensor.device
        self.bucket, self.host = bucket, host
        self.mirror = Mirror(host, device) if mirrors(device) else None
        self.flat = host if self.mirror is None else self.mirror.device
        """The buffer in which the parameters lie."""
        self.tensors = [member.tensor for member in bucket.parameters]
        for tensor, extent in zip(self.tensors, bucket.ranges, strict=True):
            view = own_storage(self.flat[extent.start : extent.stop]).view(tensor.shape)
            if fill or self.mirror is not None:
                view.copy_(tensor.data)
            tensor.data = view

    @property
    def text(self) -> str:
        """Its parameters, for messages."""
        first, last = self.bucket.parameters[0].name, self.bucket.parameters[-1].name
        return f"parameter {first!r}" if first == last else f"parameters {first!r} .. {last!r}"


def memory_of_rank_0(group: Group, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of rank 0 of ``group`` in its window, seen by all ranks: ``numel`` numbers of ``dtype``. Collective."""
    window = group.window
    assert window is not None
    size_bytes = numel * dtype.itemsize
    place = Place(0, 0)
    if group.rank == 0:
        _, place = window.allocate(size_bytes)
    records = exchange_records(group, struct.pack("<qq", *place), "place of rank 0's memory")
    # .data: its own count of writes, and not that of all memory of the segment.
    return window.view(0, Place(*struct.unpack("<qq", records[0])), size_bytes).view(dtype).data


def own_memory(training: Training) -> None:
    """Give the parameters memory of their own again, with the values that they have."""
    for item in training.parameters:
        item.tensor.data = item.tensor.data.clone()
