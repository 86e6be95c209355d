"""Which optimizers a server can run: a server updates pieces of tensors, in whatever order gradients arrive."""

from __future__ import annotations

import torch

from ..errors import UsageError

ELEMENTWISE = (
    "SGD",
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "Adamax",
    "Adagrad",
    "Adadelta",
    "RMSprop",
    "ASGD",
    "Rprop",
)
"""torch.optim's optimizers that update a number from its own gradient and state alone, so that cutting a tensor changes
no bit (one, the last, with ``fused=True``: torch's fused loops round a vector and its remainder differently)."""


def require_elementwise(optimizer: torch.optim.Optimizer, elementwise: bool | None) -> None:
    """UsageError for an optimizer that can't be run on pieces of tensors. torch runs Adafactor on them without
    complaint, and the result is wrong; so the optimizers are listed."""
    kind = type(optimizer)
    if elementwise is None:
        elementwise = kind.__name__ in ELEMENTWISE and kind.__module__.startswith("torch.optim")
        elementwise = elementwise or (kind.__name__ == "FusedAdam" and kind.__module__.startswith("apex."))
    if not elementwise:
        raise UsageError(
            f"optimizer {kind.__name__} may need whole tensors, and a server updates pieces of "
            "them. Known to be element-wise: "
            f"{', '.join(ELEMENTWISE)} of torch.optim. If yours is too, say elementwise=True; "
            "else use strategy allreduce"
        )
