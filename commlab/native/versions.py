"""Writes that autograd cannot see. torch counts the writes to a tensor (``tensor._version``), and raises where backward
needs a value that was overwritten since forward saved it. What is written by address is not counted, and whoever writes
so says so here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.autograd.graph import increment_version


def _one_by_one(tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        increment_version(tensor)


def _fastest() -> Callable[[Iterable[torch.Tensor]], None]:
    try:
        # What increment_version() calls, in all releases that take many tensors at once.
        torch._C._increment_version([])
    except Exception:
        return _one_by_one
    return torch._C._increment_version


count_write: Callable[[Iterable[torch.Tensor]], None] = _fastest()
"""Count a write to each of the tensors, so that a backward pass which needs an older value raises torch's own error.
Views share a counter with what they view; ``p.data`` has one of its own. Cost: 0.1 us a tensor."""
