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


def require_nothing_whole(optimizer: torch.optim.Optimizer, wrapper: torch.optim.Optimizer | None = None) -> None:
    """UsageError for an optimizer, or one that it wraps, with tensors or groups beside those that are cut into pieces:
    they would stay whole, and go with parameters that nobody trains any more. ``wrapper``: what wraps ``optimizer``."""
    outer = wrapper or optimizer
    for name, value in vars(optimizer).items():
        if name in ("param_groups", "state", "defaults"):
            continue
        if isinstance(value, torch.optim.Optimizer):
            inner, groups = value.param_groups, outer.param_groups
            shares = len(inner) == len(groups) and all(a is b for a, b in zip(inner, groups, strict=True))
            if shares and (value.state is outer.state or not value.state):
                require_nothing_whole(value, outer)
                continue
            what = "an optimizer with groups or state of its own"
        elif _has_tensors(value):
            what = "tensors of its own"
        else:
            continue
        raise UsageError(
            f"optimizer {type(outer).__name__} keeps {what} in .{name}, made for whole parameters, and a server "
            "updates pieces of them. Keep such tensors in optimizer.state[p], or use strategy allreduce"
        )


def _has_tensors(value: object, depth: int = 3) -> bool:
    """Whether there is a tensor of several numbers in ``value``, or in containers in it."""
    if isinstance(value, torch.Tensor):
        return value.numel() > 1
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return depth > 0 and isinstance(inner, (list, tuple, set)) and any(_has_tensors(each, depth - 1) for each in inner)
