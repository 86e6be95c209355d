"""Parameters in flat buffers, one per bucket, so that a pull writes them where they are used."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import torch

from ..errors import UsageError
from ..gradients.bucket import Bucket, own_storage
from ..gradients.mirror import Mirror, mirrors
from ..gradients.parameters import NamedParameter
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
        # Numbers, not tensors to compare with: where torch gives a storage other memory in place, all tensors that
        # share it move, those kept here too.
        self._addresses = list(map(_address, self.tensors))

    def moved(self) -> NamedParameter | None:
        """A parameter that no longer lies in the flat buffer; None where all do."""
        if list(map(_address, self.tensors)) == self._addresses:
            return None
        pairs = zip(self.bucket.parameters, self._addresses, strict=True)
        return next(member for member, address in pairs if _address(member.tensor) != address)

    @property
    def text(self) -> str:
        """Its parameters, for messages."""
        first, last = self.bucket.parameters[0].name, self.bucket.parameters[-1].name
        return f"parameter {first!r}" if first == last else f"parameters {first!r} .. {last!r}"


_address = torch.Tensor.data_ptr


def require_in_place(name: str, training: Training, flats: Iterable[FlatParameters]) -> None:
    """UsageError where a parameter of the model no longer lies in its flat buffer, or is another one by now: updates of
    strategy ``name`` would not reach it any more. Cost: some 0.1 us a parameter."""
    # Only where the model's structure has changed can a parameter be another one.
    present = None if training.structure.same_structure() else set(map(id, training.model.parameters()))
    for each in flats:
        moved = each.moved()
        if moved is None and present is not None:
            moved = next((member for member in each.bucket.parameters if id(member.tensor) not in present), None)
        if moved is not None:
            raise UsageError(
                f"rank {training.group.rank}: parameter {moved.name!r} was given other memory after "
                "commlab.strategy() (by model.to() or half(), share_memory() or sending the model to another process, "
                "load_state_dict(assign=True), p.data = ? or another Parameter in its place), and strategy "
                f"{name} updates it where it was; do that before, or with copy.deepcopy(model), and write values by "
                "engine.update_parameters()"
            )


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
