"""The arguments of a collective as it uses them: a tensor as a flat CPU buffer, the buffer's numbers back in the
tensor, and the root."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import native
from ..chunks import Range
from ..errors import UsageError
from ..native.dtypes import DTYPES, HALVES
from ..runtime.group import Group
from .tensors import as_bytes, carrier, readable, writable


def as_flat(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor as a flat CPU buffer of ``dtype``: itself where it is one already, else a copy."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_neg() or tensor.is_conj():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_cpu and tensor.is_contiguous():
        if tensor.dtype is dtype:
            return tensor if tensor.dim() == 1 else tensor.view(-1)
        if tensor.dtype is torch.float32 and dtype in HALVES:
            # Not torch's cast: its threads, where others want the cores, cost 1 MB on 4 emulated hosts as much as the
            # 16-bit wire saved.
            flat = torch.empty(tensor.numel(), dtype=dtype, device="cpu")
            native.narrow(flat, 0, tensor, 0, flat.numel())
            return flat
    return tensor.to("cpu", dtype).contiguous().view(-1)


def put_back(flat: torch.Tensor, tensor: torch.Tensor) -> None:
    """Write a staged buffer back where it is a copy."""
    if flat is tensor or (flat.data_ptr() == tensor.data_ptr() and flat.dtype == tensor.dtype):
        return
    plain = tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()
    if flat.dtype in HALVES and tensor.dtype is torch.float32 and plain:
        native.widen(tensor, 0, flat, 0, flat.numel())
    else:
        with torch.inference_mode(tensor.is_inference()):
            tensor.detach().copy_(flat.view(tensor.shape))


class Moved(NamedTuple):
    """A tensor whose numbers are moved and not computed with."""

    memory: torch.Tensor
    """The tensor itself, or its memory in a dtype that can be moved."""
    flat: torch.Tensor
    """Its numbers as a flat CPU buffer: ``memory`` itself where it is one already."""
    units: torch.Tensor
    """The same buffer in a dtype of :data:`commlab.native.dtypes.MOVED`."""
    meaning: str
    """What ranks must agree on beside that dtype."""

    def chunks(self, chunks: Sequence[Range]) -> tuple[Range, ...]:
        """Chunks of the tensor as chunks of ``units``."""
        scale = self.units.numel() // max(1, self.flat.numel())
        if scale == 1:
            return tuple(chunks)
        return tuple(Range(chunk.start * scale, chunk.stop * scale) for chunk in chunks)


def carried(tensor: torch.Tensor, where: str, *, written: bool) -> tuple[torch.Tensor, str]:
    """The memory of ``tensor``, to be given away, and where it is ``written``, to be overwritten, in a dtype that can
    be moved; and what ranks must agree on beside that dtype."""
    memory = writable(tensor, where) if written else readable(tensor, where)
    return (memory, "") if memory.dtype in DTYPES else carrier(memory, where)


def moved(tensor: torch.Tensor, where: str, *, written: bool) -> Moved:
    """:func:`carried`, as a flat buffer."""
    memory, meaning = carried(tensor, where, written=written)
    flat = as_flat(memory, memory.dtype)
    return Moved(memory, flat, as_bytes(flat) if meaning else flat, meaning)


def root_of(group: Group, kind: str, root: int) -> int:
    """``root`` as a rank of the group. UsageError for what is none."""
    try:
        root = operator.index(root)
    except TypeError:
        raise UsageError(f"rank {group.rank}: {kind} with root {root!r}, which is no rank's number") from None
    if not 0 <= root < group.size:
        raise UsageError(f"rank {group.rank}: {kind} with root {root}; the group has ranks 0..{group.size - 1}")
    return root


def require_name(where: str, name: object) -> None:
    """UsageError for a name that is no text."""
    if name is not None and not isinstance(name, str):
        raise UsageError(f"{where}: name must be text, not {name!r}")
