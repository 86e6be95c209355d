"""The formulas of the costs: what the schedules do, and what their docstrings promise."""

from __future__ import annotations

from fractions import Fraction
from math import lcm

import pytest
from simulated import rounds

from commlab.schedules import ALGORITHMS, compose
from commlab.schedules.cost import COSTS, ceil_log2, floor_log2
from commlab.schedules.step import elements_sent

NUMEL = lcm(*range(1, 18))
"""Cut evenly by any number of ranks up to 17."""

algorithms = pytest.mark.parametrize("name", ALGORITHMS)


@algorithms
@pytest.mark.parametrize("size", range(1, 18))
def test_formulas_are_what_the_schedules_do(name: str, size: int) -> None:
    plans = [list(compose.allreduce(ALGORITHMS[name], rank, size, NUMEL)) for rank in range(size)]
    most = max(map(elements_sent, plans))
    assert rounds(plans) == COSTS[name].steps(size)
    assert Fraction(most, NUMEL) == COSTS[name].elements(size)


@algorithms
def test_docstrings_state_the_formulas(name: str) -> None:
    words = " ".join((ALGORITHMS[name].__doc__ or "").split())
    assert COSTS[name].steps_text in words
    assert COSTS[name].elements_text in words


@pytest.mark.parametrize("ranks", range(1, 70))
def test_logarithms(ranks: int) -> None:
    assert 2 ** floor_log2(ranks) <= ranks < 2 ** (floor_log2(ranks) + 1)
    assert ranks <= 2 ** ceil_log2(ranks)
    assert ranks == 1 or 2 ** (ceil_log2(ranks) - 1) < ranks
