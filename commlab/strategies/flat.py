"""Parameters in flat buffers, one per bucket, so that a pull writes them where they are used."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import UsageError
from ..gradients.bucket import Bucket
from .engine import Strategy


def flatten(bucket: Bucket, flat: torch.Tensor | None = None, *, fill: bool = True) -> torch.Tensor:
    """Make the bucket's parameters views of ``flat`` (1-D, of their dtype; None: a new one), in the bucket's order.
    ``fill``: write them there first."""
    if flat is None:
        flat = torch.empty(bucket.numel, dtype=bucket.parameters[0].tensor.dtype)
    for member, place in zip(bucket.parameters, bucket.ranges, strict=True):
        view = flat[place.start : place.stop].view(member.tensor.shape)
        if fill:
            view.copy_(member.tensor.data)
        member.tensor.data = view
    return flat


def require_in_place(engine: Strategy, flats: Sequence[torch.Tensor]) -> None:
    """UsageError where a parameter of the model no longer lies in its flat buffer, or is another one by now: updates
    would not reach it any more."""
    assert engine.buckets is not None
    present = dict(engine.model.named_parameters())
    for bucket, flat in zip(engine.buckets.buckets, flats, strict=True):
        for member, place in zip(bucket.parameters, bucket.ranges, strict=True):
            here = flat.data_ptr() + place.start * flat.element_size()
            moved = member.tensor.numel() and member.tensor.data_ptr() != here
            if moved or present.get(member.name) is not member.tensor:
                raise UsageError(
                    f"rank {engine.group.rank}: parameter {member.name!r} was given other memory after "
                    "commlab.strategy() (by model.to(), load_state_dict(assign=True) or p.data = ?), and strategy "
                    f"{engine.name} updates it where it was; do that before, and change values in place after"
                )
