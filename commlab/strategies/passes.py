"""Counts the forward passes of a model, so that a rank that has dropped a step can be told from one that has not.

A rank that catches an exception in forward, or that skips a batch, and goes on, calls the same operations as its peers,
one step late. What it has done more than they did is a forward pass.
"""

from __future__ import annotations

from typing import Any

import torch

from ..gradients.own_hooks import OwnHook


class Passes:
    """Forward passes of ``model`` that will be differentiated: in training mode, with gradients on. Of a model that is
    TorchScript none is seen: it takes no hooks."""

    def __init__(self, model: torch.nn.Module):
        self.begun = 0
        """In the step that is under way."""
        self.ended = 0
        """In the step that is under way; a pass that is begun and not ended has raised an exception."""
        self._hooks: list[Any] = []
        if not isinstance(model, torch.jit.ScriptModule):
            self._hooks = [
                model.register_forward_pre_hook(OwnHook(self._begins)),
                model.register_forward_hook(OwnHook(self._ends)),
            ]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _begins(self, module: torch.nn.Module, *_: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self.begun += 1

    def _ends(self, module: torch.nn.Module, *_: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self.ended += 1
