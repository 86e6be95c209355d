"""Routes: the ways by which an operation's numbers travel. A route is one file of this folder and one row of the table.

    schedule      any algorithm of commlab.schedules, in messages, by the executor
    piggyback     few numbers, in the messages of the agreement check
    window        memory that the ranks of a node share: nobody sends
    inline        few numbers, in the window's control pages
    hierarchical  the window on each node, schedules between nodes
    whole         halves of few numbers, as a whole allreduce by piggyback
    leaders       the same numbers up to some hundred KB, by one rank of each node, in one native call

What a module offers is :class:`.route.Route`. Nothing here imports torch: the names are choices of a
flag.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final, NamedTuple

from ...schedules import ALGORITHMS


class Row(NamedTuple):
    """A route by the file that it lives in."""

    file: str
    few: str = ""
    """The file of the route that takes few numbers instead; empty: there is none."""
    halves: str = "whole"
    """The file of the route that takes the halves of few numbers instead, where nobody has named an algorithm."""


ROUTES: Final[dict[str, Row]] = {
    "direct": Row("schedule", few="piggyback"),
    "window": Row("window", few="inline", halves=""),
    "hierarchical": Row("hierarchical", few="leaders"),
}
"""By the name that a caller may give. The algorithms of :data:`commlab.schedules.ALGORITHMS` that have no row here all
go by ``schedule``."""


def names() -> tuple[str, ...]:
    """All names that a caller may give, beside ``auto``."""
    return tuple(dict.fromkeys((*ALGORITHMS, *ROUTES)))


def row_of(name: str) -> Row:
    """The row of a route or an algorithm."""
    return ROUTES.get(name, Row("schedule"))


def load(file: str) -> Any:
    """The module of a route, imported when it is first asked for."""
    return import_module(f"{__name__}.{file}")
