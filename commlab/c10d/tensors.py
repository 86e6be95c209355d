"""Tensors as commlab moves them: their numbers in order, their bytes as units, room for what arrives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from ..collectives.delivery import bytes_of
from ..native.dtypes import DTYPES
from ..runtime.group import Group

Tensors = Sequence[torch.Tensor]

_DELIVERED_BYTES = 16 * 1024
"""Where ranks have neither a window nor links, parts of one size go as one delivery up to here."""


def movable(tensor: torch.Tensor) -> bool:
    """Whether commlab moves this tensor's bytes."""
    return tensor.is_cpu and tensor.layout is torch.strided


def flat_of(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers in order, 1-D and contiguous: the tensor's own memory where that is so, else a copy. Ranks need not
    agree on how a tensor lies in memory."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous():
        tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return tensor if tensor.dim() == 1 else tensor.view(-1)


def write(target: torch.Tensor, flat: torch.Tensor) -> None:
    """The numbers of ``flat`` into ``target``, unless they are there."""
    if flat.data_ptr() == target.data_ptr() and flat.dtype is target.dtype and target.is_contiguous():
        return
    # Whoever ends an operation may be another thread than the one under inference mode that began it.
    with torch.inference_mode(target.is_inference()):
        target.detach().copy_(flat.view(target.shape))


def require(rank: int, size: int, kind: str, holds: bool, out: torch.Tensor, parts: Tensors, sizes: Any) -> None:
    """ValueError that names this rank and both sizes."""
    if not holds:
        raise ValueError(
            f"rank {rank}: {kind} among {size} ranks: the whole has {sum(part.numel() for part in parts)} "
            f"numbers, parts of {sizes}; this rank's part has {out.numel()} numbers, {list(out.shape)} of {out.dtype}"
        )


_UNITS: Final = ((8, torch.int64), (4, torch.int32), (2, torch.float16))


def aligned(flat: torch.Tensor) -> torch.Tensor:
    """``flat``, or a copy where its bytes can't be seen as larger units."""
    if flat.dtype in DTYPES or flat.storage_offset() * flat.element_size() % _UNITS[0][0] == 0:
        return flat
    return flat.clone()


def as_moved(flat: torch.Tensor, part_numel: int, group: Group) -> torch.Tensor | None:
    """``flat``, which is aligned, in a dtype that commlab's halves move, for parts of ``part_numel`` numbers; None
    where few bytes are better delivered. The choice depends on sizes and the group's ways alone, so that all ranks
    choose alike."""
    part_bytes = part_numel * flat.element_size()
    quick = group.window is not None or group.transport.moves_itself
    if part_bytes <= (0 if quick else _DELIVERED_BYTES):
        return None
    if flat.dtype in DTYPES:
        return flat
    unit = next((dtype for unit_bytes, dtype in _UNITS if part_bytes % unit_bytes == 0), torch.uint8)
    return bytes_of(flat).view(unit)


def room_for(out: torch.Tensor) -> torch.Tensor:
    """Where to write what goes to ``out``: its own memory where that is contiguous."""
    out = out.detach()
    return out.view(-1) if out.is_contiguous() else torch.empty(out.numel(), dtype=out.dtype, device="cpu")


def write_all(outs: Tensors, flats: Tensors) -> None:
    for out, flat in zip(outs, flats, strict=True):
        write(out, flat)
