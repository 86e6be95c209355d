"""Collectives: schedules, the executor, and the operations on tensors. ``ALGORITHMS`` is the table of schedules by
name."""

from __future__ import annotations

from typing import Final

from . import direct, halving, ring, tree
from .schedules import Algorithm

ALGORITHMS: Final[dict[str, Algorithm]] = {"ring": ring, "halving": halving, "tree": tree, "direct": direct}

CHOICES: Final[tuple[str, ...]] = ("auto", *ALGORITHMS, "window", "hierarchical")
"""What a caller may name: schedules, and the two that need shared memory."""
