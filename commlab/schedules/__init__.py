"""Schedules: what each rank sends, receives and reduces, as data; ``ALGORITHMS`` is the table of them by name. Nothing here
imports torch."""

from __future__ import annotations

from typing import Final

from . import direct, halving, ring, tree
from .compose import Algorithm

ALGORITHMS: Final[dict[str, Algorithm]] = {"ring": ring, "halving": halving, "tree": tree, "direct": direct}
