"""The norm of a gradient, precise enough to be the same for every way of cutting it, and what clipping makes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

_BLOCK = 4096
"""torch adds the squares of a whole fp32 tensor in fp32, which at 6 M numbers is wrong by 1e-4, and by something else
for each way of cutting the gradient; blocks of this size are right to 1e-8, and as fast."""


def norm_squared(gradients: Iterable[torch.Tensor]) -> float:
    """Sum of the squares of all numbers; blocks in fp32 (fp64 gradients in fp64), their sum in float64."""
    total = 0.0
    for gradient in gradients:
        flat = gradient.reshape(-1) if gradient.dtype == torch.float64 else gradient.float().reshape(-1)
        even = flat.numel() // _BLOCK * _BLOCK
        for block in (flat[:even].view(-1, _BLOCK), flat[even:].view(1, -1)):
            total += float(torch.linalg.vector_norm(block, dim=1).double().square().sum())
    return total


@dataclass
class Squares:
    """The sum of the squares of the numbers that this rank has reduced: added up by the loop that reduced them, where
    that loop can, else by a pass over them."""

    known: float | None = None
    """The sum, where the loop that reduced has added it up; None where it has not."""

    def of(self, numbers: torch.Tensor) -> float:
        """The sum; ``numbers`` are those that this rank has reduced."""
        return norm_squared([numbers]) if self.known is None else self.known


def clip_factor(norm: float, max_norm: float | None) -> float:
    """What clipping multiplies the gradient by: torch.nn.utils.clip_grad_norm_'s rule, so that results compare. A NaN
    norm gives NaN, and an infinite one 0."""
    factor = 1.0 if max_norm is None else max_norm / (norm + 1e-6)
    return 1.0 if factor > 1.0 else factor  # in this order: a NaN is neither above 1 nor below


def scale_(gradients: list[torch.Tensor], factor: float) -> None:
    """Multiply all of them in place."""
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)
