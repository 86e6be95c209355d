"""Checkpoints: what a run needs to go on, on any number of ranks. ``store`` knows files, ``state`` what is in them,
``run`` how ranks write and read one together."""

from __future__ import annotations

from .checkpoints import Checkpoints

__all__ = ["Checkpoints"]
