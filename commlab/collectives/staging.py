"""A tensor as a flat CPU buffer, and the buffer's numbers back in the tensor."""

from __future__ import annotations

import torch

from .. import native
from ..native.dtypes import HALVES


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
