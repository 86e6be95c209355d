"""Many tensors in one operation: one agreement check and one exchange for each dtype, however small the tensors are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import UsageError
from ..native.versions import count_write
from ..runtime.group import Group
from ..runtime.world import resolve
from .allreduce import allreduce
from .plan import require, where_of
from .staging import as_flat, put_back, require_name
from .tensors import writable

_KIND = "allreduce"
"""Of which this is one for each dtype."""


def grouped_allreduce(
    tensors: Sequence[torch.Tensor],
    op: str = "mean",
    name: str | None = None,
    algorithm: str = "auto",
    wire: str | None = None,
    group: Group | None = None,
) -> Sequence[torch.Tensor]:
    """Reduce all ``tensors`` in place over all ranks and return them: each as :func:`commlab.allreduce` would, those
    of a dtype in one buffer. Ranks must give tensors of the same shapes in the same order, which is compared; ``wire``
    is for those of floating point. Cost: an allreduce of all numbers, and a copy of them each way."""
    group = resolve(group)
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    try:
        require_name(f"rank {group.rank}: grouped allreduce", name)
        given = list(tensors)
        if not given:
            raise UsageError(f"rank {group.rank}: grouped allreduce of no tensor")
        for tensor in given:
            floats = isinstance(tensor, torch.Tensor) and tensor.dtype.is_floating_point
            require(group, "grouped allreduce", tensor, op, wire if floats else None)
            memory = writable(tensor, where_of(group, "grouped allreduce", tensor))
            by_dtype.setdefault(tensor.dtype, []).append(memory)
        wholes = {
            dtype: torch.cat([as_flat(memory, dtype) for memory in by_dtype[dtype]])
            for dtype in sorted(by_dtype, key=str)
        }
    except Exception as error:
        group.refuse(_KIND, name, error).wait()
        raise
    # One dtype after the other: where a rank refuses, it does so in the place of the first.
    for number, (dtype, whole) in enumerate(wholes.items(), 1):
        those = by_dtype[dtype]
        shapes = "; ".join(str(list(memory.shape)) for memory in those)
        title = f"{name or 'tensors'}, dtype {number} of {len(wholes)}: {len(those)} tensors: {shapes}"
        allreduce(whole, op, title, algorithm, wire if dtype.is_floating_point else None, group)
        for memory, piece in zip(those, whole.split([memory.numel() for memory in those]), strict=True):
            put_back(piece, memory)
    count_write(given)
    return tensors
