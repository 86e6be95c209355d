"""Parameters in flat buffers, one per bucket, so that a pull writes them where they are used."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import UsageError
from ..gradients.bucket import Bucket
from ..gradients.mirror import Mirror, mirrors
from ..gradients.parameters import plain_name
from .start import Training


class FlatParameters:
    """The parameters of a bucket, which become views of one flat buffer, in the bucket's order. ``host``: that buffer,
    or where the parameters are on a GPU its mirror in the host's memory; 1-D, of the parameters' dtype. ``fill``: write
    the parameters there first."""

    def __init__(self, bucket: Bucket, host: torch.Tensor, *, fill: bool = True):
        device = bucket.parameters[0].tensor.device
        self.bucket, self.host = bucket, host
        self.mirror = Mirror(host, device) if mirrors(device) else None
        self.flat = host if self.mirror is None else self.mirror.device
        """The buffer that the parameters are views of."""
        for member, extent in zip(bucket.parameters, bucket.ranges, strict=True):
            view = self.flat[extent.start : extent.stop].view(member.tensor.shape)
            if fill or self.mirror is not None:
                view.copy_(member.tensor.data)
            member.tensor.data = view

    @property
    def text(self) -> str:
        """Its parameters, for messages."""
        first, last = self.bucket.parameters[0].name, self.bucket.parameters[-1].name
        return f"parameter {first!r}" if first == last else f"parameters {first!r} .. {last!r}"


def require_in_place(name: str, training: Training, flats: Iterable[FlatParameters]) -> None:
    """UsageError where a parameter of the model no longer lies in its flat buffer, or is another one by now: updates of
    strategy ``name`` would not reach it any more."""
    present = {plain_name(name): tensor for name, tensor in training.model.named_parameters()}
    for each in flats:
        start, itemsize = each.flat.data_ptr(), each.flat.element_size()
        for member, extent in zip(each.bucket.parameters, each.bucket.ranges, strict=True):
            moved = member.tensor.numel() and member.tensor.data_ptr() != start + extent.start * itemsize
            if moved or present.get(member.name) is not member.tensor:
                raise UsageError(
                    f"rank {training.group.rank}: parameter {member.name!r} was given other memory after "
                    "commlab.strategy() (by model.to(), load_state_dict(assign=True) or p.data = ?), and strategy "
                    f"{name} updates it where it was; do that before, and write values by engine.update_parameters()"
                )


def own_memory(training: Training) -> None:
    """Give the parameters memory of their own again, with the values that they have."""
    for item in training.parameters:
        item.tensor.data = item.tensor.data.clone()
