"""What an allreduce of n elements among P ranks costs by each algorithm, as formulas. The tests hold the formulas to
the steps of the schedules, and the algorithms' docstrings to the formulas.

    steps       message times one after the other, when a message of any length takes one
    elements    sent by the rank that sends most, as a share of n; chunks of equal size
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Final, NamedTuple


class Cost(NamedTuple):
    """The formulas of one algorithm, for the reader and for the machine. ``steps_text`` and ``elements_text`` stand in
    the algorithm's docstring."""

    steps_text: str
    steps: Callable[[int], int]
    elements_text: str
    elements: Callable[[int], Fraction]


def floor_log2(ranks: int) -> int:
    """The largest k with 2^k <= ranks."""
    return ranks.bit_length() - 1


def ceil_log2(ranks: int) -> int:
    """The smallest k with 2^k >= ranks."""
    return (ranks - 1).bit_length()


def _halving_elements(ranks: int) -> Fraction:
    active = 1 << floor_log2(ranks)
    return 2 * Fraction(active - 1, active) + (ranks > active)


COSTS: Final[dict[str, Cost]] = {
    "ring": Cost(
        "2 (P-1) steps",
        lambda ranks: 2 * (ranks - 1),
        "2 n (P-1)/P elements",
        lambda ranks: 2 * Fraction(ranks - 1, ranks),
    ),
    "halving": Cost(
        "2 floor(log2 P) steps",
        lambda ranks: 2 * floor_log2(ranks) + 2 * (ranks > 1 << floor_log2(ranks)),
        "2 n (Q-1)/Q elements",
        _halving_elements,
    ),
    "tree": Cost(
        "2 ceil(log2 P) steps",
        lambda ranks: 2 * ceil_log2(ranks),
        "n ceil(log2 P)",
        lambda ranks: Fraction(ceil_log2(ranks)),
    ),
    "direct": Cost(
        "2 (P-1) steps",
        lambda ranks: 2 * (ranks - 1),
        "2 n (P-1)/P elements",
        lambda ranks: 2 * Fraction(ranks - 1, ranks),
    ),
}
"""By the names of :data:`commlab.schedules.ALGORITHMS`."""
