"""The parameters that are trained, by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UsageError


@dataclass(frozen=True)
class NamedParameter:
    """A parameter as the buckets see it; ``group`` is the index of its group in the user's optimizer."""

    name: str
    tensor: torch.nn.Parameter
    group: int
    index: int
    """Place in registration order."""


def named_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[NamedParameter]:
    """The trainable parameters of ``model`` in registration order, a tied one once, with their groups in ``optimizer``.

    UsageError for a parameter that the optimizer does not have, or has but the model does not, and for sparse or
    complex ones.
    """
    group_of = {id(tensor): group for group, entry in enumerate(optimizer.param_groups) for tensor in entry["params"]}
    named: list[NamedParameter] = []
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        if id(tensor) not in group_of:
            raise UsageError(
                f"parameter {name!r} is trainable, but the optimizer does not have it; add it, or freeze it"
            )
        if not tensor.dtype.is_floating_point:
            raise UsageError(f"parameter {name!r} is {tensor.dtype}; gradients travel as floating-point numbers")
        named.append(NamedParameter(name, tensor, group_of.pop(id(tensor)), len(named)))
    if group_of:
        shapes = [
            list(tensor.shape)
            for entry in optimizer.param_groups
            for tensor in entry["params"]
            if id(tensor) in group_of
        ]
        raise UsageError(
            f"the optimizer has {len(group_of)} parameters that are not trainable ones of the model: {shapes[:5]}"
        )
    return named
