"""Many tensors in one operation: one agreement check and one exchange for each dtype, however small the tensors are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import UsageError
from ..runtime.group import Group
from ..runtime.world import resolve
from .allreduce import allreduce_async
from .plan import require


def grouped_allreduce(
    tensors: Sequence[torch.Tensor],
    op: str = "mean",
    name: str | None = None,
    algorithm: str = "auto",
    wire: str | None = None,
    group: Group | None = None,
) -> Sequence[torch.Tensor]:
    """Reduce all ``tensors`` in place over all ranks and return them: each as :func:`commlab.allreduce` would, those
    of a dtype in one buffer. Ranks must give tensors of the same shapes in the same order, which is compared. Cost: an
    allreduce of all numbers, and a copy of them each way."""
    group = resolve(group)
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        require(group, "grouped allreduce", tensor, op, wire)
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    under_way = []
    for dtype, those in sorted(by_dtype.items(), key=lambda item: str(item[0])):
        shapes = "; ".join(str(list(tensor.shape)) for tensor in those)
        title = f"{name or 'tensors'}: {len(those)} of {str(dtype).removeprefix('torch.')}: {shapes}"
        whole = torch.cat([tensor.detach().to("cpu").reshape(-1) for tensor in those])
        used = wire if dtype.is_floating_point else None
        under_way.append((allreduce_async(whole, op, title, algorithm, used, group), whole, those))
    if not tensors:
        raise UsageError(f"rank {group.rank}: grouped allreduce of no tensor")
    for handle, whole, those in under_way:
        handle.wait()
        for tensor, piece in zip(those, whole.split([tensor.numel() for tensor in those]), strict=True):
            tensor.detach().copy_(piece.view(tensor.shape))
    return tensors
