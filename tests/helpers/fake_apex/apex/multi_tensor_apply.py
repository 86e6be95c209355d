"""``multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args)``, as Apex has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class MultiTensorApply:
    available = True

    def __init__(self, chunk_size: int):
        self.chunk_size = chunk_size

    def __call__(self, op: Callable[..., Any], flag: torch.Tensor, lists: list[list[torch.Tensor]], *args: Any) -> Any:
        return op(self.chunk_size, flag, lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)
