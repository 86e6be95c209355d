"""The parameters that are trained, each with its name, its group in the optimizer and its index."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..chunks import Range
from ..errors import UsageError


@dataclass(frozen=True)
class NamedParameter:
    """A trainable parameter of the user's model."""

    name: str
    tensor: torch.nn.Parameter
    group: int
    """The index of the parameter's group in the user's optimizer."""
    index: int
    """How many trainable parameters the model has registered before this one."""

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


def plain_name(name: str) -> str:
    """A parameter's or buffer's name without what torch.compile() puts into it, so that state which was saved with it
    loads without, and the reverse."""
    return name.replace("_orig_mod.", "")


def named_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[NamedParameter]:
    """The trainable parameters of ``model`` in registration order, a tied one once, with their groups in ``optimizer``.

    UsageError for a parameter that the optimizer does not have, for one that the optimizer has and the model does not,
    and for a parameter that is not of a floating-point dtype.
    """
    group_of = {id(tensor): group for group, entry in enumerate(optimizer.param_groups) for tensor in entry["params"]}
    named: list[NamedParameter] = []
    for full_name, tensor in model.named_parameters():
        name = plain_name(full_name)
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


def adjoining(parameters: Iterable[NamedParameter]) -> list[Range]:
    """The range of each parameter in a flat buffer in which all of them lie side by side."""
    ranges, stop = [], 0
    for parameter in parameters:
        ranges.append(Range(stop, stop + parameter.tensor.numel()))
        stop = ranges[-1].stop
    return ranges
