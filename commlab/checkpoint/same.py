"""What a checkpoint and the program that takes it up must have in common."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import UsageError
from ..gradients.parameters import NamedParameter, plain_name

log = logging.getLogger("commlab")


def require_same_model(
    parameters: Iterable[NamedParameter],
    own_fixed: Sequence[tuple[str, torch.Tensor]],
    owned: Sequence[Mapping[str, Any]],
    fixed: Mapping[str, torch.Tensor],
) -> None:
    """UsageError for the first tensor that only one side has, or that has another size or kind of numbers.
    ``parameters`` and ``own_fixed``: what this program trains, and does not train; ``owned`` and ``fixed``: the ranks'
    states and the tensors of the checkpoint."""
    saved = {name: list(tensor.shape) for name, tensor in fixed.items()}
    mine = {name: list(tensor.shape) for name, tensor in own_fixed}
    for item in parameters:
        mine[item.name] = [item.tensor.numel()]
    for state in owned:
        for name, pieces in state["pieces"].items():
            saved.setdefault(name, [0])
            saved[name][0] += sum(piece["stop"] - piece["start"] for piece in pieces)
    # A parameter without numbers may be in no rank's state.
    for name in sorted(mine.keys() | saved.keys()):
        if mine.get(name, [0]) != saved.get(name, [0]):
            raise UsageError(
                f"{name!r} has shape or size {saved.get(name, 'none')} in the checkpoint, and "
                f"{mine.get(name, 'none')} in this model; resume with the model that was saved"
            )
    for name, tensor in own_fixed:
        if tensor.dtype != fixed[name].dtype and not (tensor.is_floating_point() and fixed[name].is_floating_point()):
            raise UsageError(
                f"{name!r} is {fixed[name].dtype} in the checkpoint, and {tensor.dtype} in this model; resume with "
                "the model that was saved"
            )


def require_same_scheduler(
    scheduler: torch.optim.lr_scheduler.LRScheduler | None, saved: Mapping[str, Any], *, speak: bool
) -> None:
    """UsageError where the schedule in ``saved``, rank 0's state, is of another class than ``scheduler``; a warning,
    where ``speak``, if only one of the two programs has a schedule."""
    own = None if scheduler is None else type(scheduler).__name__
    was = None if saved["scheduler"] is None else saved.get("scheduler_class", own)
    if own is not None and was is not None and own != was:
        raise UsageError(
            f"the checkpoint of step {saved['step']} was saved with a {was}, and the scheduler is a {own}; give "
            "Checkpoints the scheduler that was saved, or none"
        )
    if own != was and speak:
        log.warning(
            "the checkpoint of step %d was saved with %s, and Checkpoints has %s: %s",
            saved["step"],
            "no scheduler" if was is None else f"a {was}",
            "none" if own is None else f"a {own}",
            "what the schedule had done is lost" if own is None else "the schedule starts anew",
        )


def with_extra_state(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The modules that keep more than tensors in torch's ``state_dict()``, by name."""
    without = torch.nn.Module.get_extra_state
    found = ((plain_name(name), module) for name, module in model.named_modules())
    return [(name, module) for name, module in found if type(module).get_extra_state is not without]
