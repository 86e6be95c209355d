"""What the tests under mpirun go through: every algorithm, on every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import Ranks

from commlab.collectives import ALGORITHMS
from commlab.collectives.group import Group

algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


def all_groups(ranks: Ranks) -> Iterator[Group]:
    """This rank's groups, so that all numbers of ranks occur."""
    return map(ranks.halves, ranks.splits)
