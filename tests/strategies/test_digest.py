"""The digest of hyper-parameters that ranks compare: another one for every change, and one for equal values."""

from __future__ import annotations

import math
from typing import Any

import torch
from coupled import (
    model_of,
    two_groups,
)

from commlab.precision.loss_scale import LossScale
from commlab.strategies.hypers import HyperParameters, text_of


def test_the_digest_sees_every_change() -> None:
    """A3: values that are written in place, and values of every type."""
    model = model_of()
    optimizer = two_groups(model)
    scale = LossScale(4.0)
    hypers = HyperParameters(optimizer, scale)
    entry = optimizer.param_groups[0]
    seen = {hypers.digest()}
    assert hypers.digest() in seen

    def changed() -> None:
        found = hypers.digest()
        assert found not in seen and hypers.digest() == found
        seen.add(found)

    entry["lr"] = math.nextafter(0.01, 1)
    changed()
    entry["lr"] = torch.tensor(0.5)
    changed()
    entry["lr"].fill_(0.25)
    changed()
    entry["lr"].data.mul_(2).add_(1)
    changed()
    entry["betas"] = [0.5, 0.6]
    changed()
    entry["betas"][1] = 0.7
    changed()
    entry["betas"] = (0.9, torch.tensor(0.99))
    changed()
    entry["betas"][1].fill_(0.98)
    changed()
    entry["mode"] = "min"
    changed()
    entry["mode"] = "max"
    changed()
    entry["mode"] = None
    changed()
    entry["big"] = 10**400  # beyond float64
    changed()
    entry["big"] += 1
    changed()
    del entry["big"], entry["mode"]
    assert hypers.digest() in seen
    entry["nan"] = math.nan
    changed()
    entry["eps"] = torch.tensor([1.0, 2.0])
    changed()
    scale.value = 2.0
    changed()
    optimizer.add_param_group({"params": [torch.zeros(1)]})
    changed()


def test_the_digest_is_one_for_equal_values() -> None:
    """A3: what two ranks write differently, and update with alike."""

    def digest(**values: Any) -> bytes:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        optimizer.param_groups[0].update(values)
        return HyperParameters(optimizer, None).digest()

    assert digest(lr=1) == digest(lr=1.0) == digest(lr=True)
    assert digest(nesterov=False) == digest(nesterov=0)
    assert digest(lr=0.1) == digest()
    assert digest(lr=math.nan) == digest(lr=float("nan"))
    assert digest(lr=torch.tensor(0.5)) == digest(lr=torch.tensor(0.5, dtype=torch.float64))
    assert digest(hook=test_the_digest_sees_every_change) != digest(hook=test_the_digest_is_one_for_equal_values)
    assert text_of({"b": [1, 2.5], "a": torch.float16}) == "{a: torch.float16, b: (1.0, 2.5)}"
