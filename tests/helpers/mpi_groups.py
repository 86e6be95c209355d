"""What tests of collectives under mpirun go through: every algorithm, on every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mpi_ranks import Ranks

from commlab.runtime.group import Group
from commlab.schedules import ALGORITHMS

algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


def all_groups(ranks: Ranks) -> Iterator[Group]:
    """This rank's groups, one for each way to halve the ranks, so that all numbers of ranks occur. Collective."""
    return map(ranks.halves, ranks.splits)
