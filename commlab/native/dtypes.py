"""Dtypes and reductions as the native module numbers them, and the wires' dtypes."""

from __future__ import annotations

import torch

from ..errors import UsageError

OP_CODES = {"sum": 0, "prod": 1, "min": 2, "max": 3}


# dtype -> (its code in kernels/cpu/dtype.h, bytes per number)
DTYPES = {
    torch.float32: (0, 4),
    torch.float64: (1, 8),
    torch.float16: (2, 2),
    torch.bfloat16: (3, 2),
    torch.int32: (4, 4),
    torch.int64: (5, 8),
}


MOVED = {**DTYPES, torch.uint8: (6, 1)}
"""What can be moved, but not computed with: bytes too."""


WIRES: dict[str | None, torch.dtype | None] = {None: None, "fp16": torch.float16, "bf16": torch.bfloat16}


def require_wire(wire: str | None, where: str = "") -> None:
    """UsageError for a name that is no key of ``WIRES``. ``where``: the words before it in the message."""
    if wire not in WIRES:
        raise UsageError(f"{where}unknown wire {wire!r}; there are {', '.join(map(str, WIRES))}")


HALVES = (torch.float16, torch.bfloat16)
