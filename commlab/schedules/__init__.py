"""Schedules: what each rank sends, receives and reduces, as data. Nothing here imports torch.

    ring  halving  tree  direct    an algorithm each: the chunks it likes, and the two halves of an allreduce
    step                           what a schedule is made of
    compose                        the operations, composed of an algorithm's two halves
    cost                           what an allreduce costs by each of them, as formulas

``ALGORITHMS`` is the table of them by name.
"""

from __future__ import annotations

from typing import Final

from . import direct, halving, ring, tree
from .compose import Algorithm

ALGORITHMS: Final[dict[str, Algorithm]] = {"ring": ring, "halving": halving, "tree": tree, "direct": direct}
