"""Hyper-parameters on their way to the servers: when they travel, and when they need not."""

from __future__ import annotations

import torch
from training import alone

from commlab.ps.store import ParameterServer


def test_hyper_parameters_travel_when_they_have_changed() -> None:
    """B19: also in place, as tensors do; and not again while they are as before."""
    store = ParameterServer([("w", torch.zeros(3))], lambda params: torch.optim.SGD(params, lr=1.0), group=alone())
    assert store.optimizer is not None
    entry, link, before = store.optimizer.param_groups[0], store._client.links[0], torch.zeros(3)

    def push() -> tuple[float, int]:
        """How far a gradient of ones moves the value, and the messages with numbers or hyper-parameters."""
        sent, now = link.messages_sent, torch.empty(3)
        store.push("w", torch.ones(3)).wait()
        messages = link.messages_sent - sent
        store.step()
        store.pull("w", now).wait()
        moved = float((before - now)[0])
        before.copy_(now)
        return moved, messages // 2

    assert [push(), push()] == [(1.0, 2), (1.0, 1)]
    entry["lr"] = 0.5
    assert [push(), push()] == [(0.5, 2), (0.5, 1)]
    entry["lr"] = torch.tensor(0.25)
    assert [push(), push()] == [(0.25, 2), (0.25, 1)]
    entry["lr"].fill_(0.125)
    assert [push(), push()] == [(0.125, 2), (0.125, 1)]
    entry["lr"] = 0.5
    assert push() == (0.5, 2)
    store.lr_factor = 0.5
    assert [push(), push()] == [(0.25, 2), (0.25, 1)]
    store.close()
