"""What tests of strategies under mpirun share: the strategies, the groups that train, and that ranks stay equal."""

from __future__ import annotations

import pytest
from mpi_ranks import Ranks
from mpi_windows import few_ranks
from training import Run

from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group
from commlab.schedules import ALGORITHMS

OURS = ("allreduce", "ps", "dps")
"""commlab's own strategies for several ranks; horovod and ddp are others'."""

ours = pytest.mark.parametrize("strategy", OURS)

EVERY_ALGORITHM = ("window", *ALGORITHMS)
"""The values of ``algorithm`` with which a strategy exchanges gradients on one node."""


def groups_of(ranks: Ranks) -> list[Group]:
    """This rank's groups among ``mpi_windows.GROUPS``: one, two or none of them. Collective."""
    return few_ranks(ranks)


def assert_same_bits_everywhere(run: Run) -> None:
    """All ranks had the same parameters after every step. Collective."""
    everyones = gather_bytes(run.engine.group, b"".join(run.digests), "digests")
    for step, mine in enumerate(run.digests):
        same = {row[16 * step : 16 * step + 16] for row in everyones} == {mine}
        assert same, f"ranks have different parameters after step {step}"
