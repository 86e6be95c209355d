"""Hyper-parameters on their way from workers to servers: what is checked before, and JSON."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import torch

from ..errors import UsageError

NOT_SENT = ("params", "param_names")
"""What a group of an optimizer has besides hyper-parameters."""


class Hypers(NamedTuple):
    """What a worker's updates are made with: the optimizer's hyper-parameters, by ``groups``, and ``scale``, which the
    worker's gradients have been multiplied by."""

    groups: list[dict[str, Any]] | None = None
    scale: float = 1.0


def encode(
    optimizer: torch.optim.Optimizer | None, groups: int, lr_factor: float = 1.0, grad_scale: float = 1.0
) -> bytes:
    """The hyper-parameters of ``optimizer``, learning rates times ``lr_factor``. UsageError for what is not finite
    (numbers other than learning rates may be infinite), for what JSON can't hold, and where there are not as many
    groups as the store was built with."""
    for name, number in (("lr_factor", lr_factor), ("grad_scale", grad_scale)):
        if not math.isfinite(number):
            raise UsageError(f"the parameter server's {name} is {number}; give a finite number")
    sent = None
    if optimizer is not None:
        if len(optimizer.param_groups) != groups:
            raise UsageError(
                f"the optimizer has {len(optimizer.param_groups)} groups, and the parameter server was built with "
                f"{groups}; build a new one to add a group"
            )
        sent = [
            {key: _plain(value, at, key) for key, value in entry.items() if key not in NOT_SENT}
            for at, entry in enumerate(optimizer.param_groups)
        ]
        for entry in sent:
            if "lr" in entry:
                entry["lr"] *= lr_factor
    return json.dumps({"groups": sent, "scale": grad_scale}).encode()


def decode(data: bytes) -> Hypers:
    """The reverse of :func:`encode`. JSON has made lists of tuples."""
    sent = json.loads(data)
    groups = sent["groups"]
    if groups is not None:
        groups = [{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()} for entry in groups]
    return Hypers(groups, sent["scale"])


def is_fixed(value: Any) -> bool:
    """Whether ``value`` can't change without becoming another object, as tensors and lists do."""
    if isinstance(value, tuple):
        return all(map(is_fixed, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _plain(value: Any, at: int, key: str) -> Any:
    """A hyper-parameter as JSON has it."""
    if torch.is_tensor(value) and value.numel() == 1:
        value = value.item()
    what = f"{key!r} of the optimizer's group {at}"
    if isinstance(value, float) and (math.isnan(value) or (key == "lr" and math.isinf(value))):
        raise UsageError(f"{what} is {value}, with which every parameter would become NaN; give a finite number")
    if isinstance(value, (list, tuple)):
        return [_plain(item, at, key) for item in value]
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise UsageError(
            f"{what} is a {type(value).__name__}, which can't be sent to the servers; give numbers, text, None, and "
            "tuples of them, and keep everything else outside of the optimizer's groups"
        )
    return value
