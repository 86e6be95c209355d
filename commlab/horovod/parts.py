"""The tensors of what is carried out, as their numbers lie one behind the other, and the buffer where they do."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..c10d.window_tensor import tensor_in
from .announced import Ready
from .announcement import described
from .channel import Channel

ALONE_BYTES = 1024 * 1024
"""From so many bytes on a tensor in plain memory is used where it lies."""


class Part:
    """One tensor of a batch: ``source`` this rank's contribution (None: nothing), ``target`` where its result goes
    (None: nobody wants it)."""

    __slots__ = ("dtype", "numel", "shape", "source", "target")

    def __init__(self, each: Ready, index: int):
        self.dtype, self.shape, self.numel = described(each.request.dtypes[index], each.request.shapes[index])
        submission = each.submission
        self.source = submission.tensors[index].detach() if submission is not None and submission.tensors else None
        self.target = submission.outputs[index].detach() if submission is not None and submission.outputs else None


def parts_of(batch: Sequence[Ready]) -> list[Part]:
    return [Part(each, index) for each in batch for index in range(len(each.request.shapes))]


def buffer_of(channel: Channel, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """``numel`` numbers, 1-D, in the window where there is one; the channel's own, used again by its next operation."""
    size_bytes = max(64, numel * dtype.itemsize)
    held = channel.buffers.get("fused")
    if held is None or held.numel() < size_bytes:
        window = channel.group.window
        room_bytes = 1 << (size_bytes - 1).bit_length()
        channel.buffers.clear()
        held = (
            torch.empty(room_bytes, dtype=torch.uint8, device="cpu")
            if window is None
            else tensor_in(window, room_bytes, torch.uint8)
        )
        channel.buffers["fused"] = held
    return held[: numel * dtype.itemsize].view(dtype)


def units_of(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers in order, 1-D; complex ones as pairs."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.reshape(-1)


def width_of(dtype: torch.dtype) -> int:
    return 2 if dtype.is_complex else 1
