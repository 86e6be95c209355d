"""What the tests of strategies on real ranks share."""

from __future__ import annotations

import pytest
from mpi_ranks import Ranks
from mpi_windows import window_group
from training import Run

from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group
from commlab.schedules import ALGORITHMS

OURS = ("allreduce", "ps", "dps")


GROUPS = ((0, 1, 2, 3), (4, 5, 6), (6, 7))
"""4, 3 and 2 ranks of one launch, nearly all of them at once."""


EVERY_ALGORITHM = ("window", *ALGORITHMS)


ours = pytest.mark.parametrize("strategy", OURS)


def groups_of(ranks: Ranks) -> list[Group]:
    """This rank's groups: one, two or none of them."""
    made = [window_group(ranks, *members) for members in GROUPS]
    return [group for group in made if group is not None]


def assert_same_bits_everywhere(run: Run) -> None:
    """All ranks had the same parameters after every step. Collective."""
    everyones = gather_bytes(run.engine.group, b"".join(run.digests), "digests")
    for step, mine in enumerate(run.digests):
        same = {row[16 * step : 16 * step + 16] for row in everyones} == {mine}
        assert same, f"ranks have different parameters after step {step}"
