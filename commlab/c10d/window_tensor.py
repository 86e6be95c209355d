"""Tensors in the window that give their memory back when nobody holds them any more."""

from __future__ import annotations

import ctypes
import weakref

import torch

from ..window.memory import Window, size_class


def tensor_in(window: Window, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """``numel`` numbers, 1-D, not zeroed. All views of the tensor count as holding it."""
    if not numel:
        return torch.empty(0, dtype=dtype, device="cpu")
    memory, _ = window.allocate(size_class(numel * dtype.itemsize))
    # torch holds the object whose buffer it was given as long as any tensor lies there.
    holder = (ctypes.c_uint8 * memory.numel()).from_address(memory.data_ptr())
    weakref.finalize(holder, window.free, memory).atexit = False
    return torch.frombuffer(holder, dtype=dtype, count=numel)
