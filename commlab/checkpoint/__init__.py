"""Checkpoints: what a training run needs to go on, on any number of ranks. ``files`` knows the files of a checkpoint,
``checkpoints`` how ranks write and read one together, ``pieces`` the optimizer's state by parameter and range,
``nested`` state as JSON text and tensors."""

from __future__ import annotations

from .checkpoints import Checkpoints

__all__ = ["Checkpoints"]
