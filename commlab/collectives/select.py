"""``algorithm="auto"``: one table by operation, size, ranks, wire and nodes, each row with its reason. The figures
behind the rows are in docs/select.md and come from ``python -m bench.allreduce``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from ..errors import UsageError
from .routes import names

CHOICES: Final[tuple[str, ...]] = ("auto", *names())
"""What a caller may name: the algorithms of :mod:`commlab.schedules`, and the routes that need shared memory."""


class Conditions(NamedTuple):
    """What the choice may depend on; the same on all ranks."""

    kind: str
    """allreduce, reduce_scatter, allgather; reduce and broadcast where one rank owns everything."""
    size: int
    bytes: int
    """Of all numbers as they travel."""
    wire_is_16_bit: bool
    transport: str
    window: bool = False
    """Whether the group shares a window."""
    hierarchical: bool = False
    """Whether the group has several nodes, and each node a window."""
    nodes: int = 1
    """How many nodes the ranks are on."""
    piggyback: bool = False
    """Whether the numbers can travel with the agreement check."""


class Preference(NamedTuple):
    """A row of the table: ``algorithm`` is taken where it ``applies``, for this ``reason``."""

    applies: Callable[[Conditions], bool]
    algorithm: str
    reason: str


DIRECT_LINKS_BYTES: Final = 512 * 1024
"""Up to here the ring's steps, one after the other, cost more than the crowd of all senders at one receiver."""

TABLE: tuple[Preference, ...] = (
    Preference(lambda case: case.window, "window", "on one node nobody sends: the cost of a copy, and one rounding"),
    Preference(
        lambda case: case.hierarchical and case.kind == "allreduce" and case.bytes > 64 * 1024,
        "hierarchical",
        "a node sends as if it were one rank, and all its ranks carry a share",
    ),
    Preference(
        lambda case: case.piggyback,
        "direct",
        "few numbers travel with the agreement check: one message time, two beyond 4 KB",
    ),
    Preference(
        lambda case: case.size == 2,
        "direct",
        "with one peer all algorithms send the same bytes; direct needs the fewest steps and rounds once",
    ),
    Preference(
        lambda case: (
            case.wire_is_16_bit
            and case.size <= 16
            and (case.nodes == 1 or (case.bytes <= 2**20 and case.kind not in ("reduce", "broadcast")))
        ),
        "direct",
        "a 16-bit wire is rounded once here and at every hop elsewhere; on a slow link its "
        "crowd costs 1.3 times the ring",
    ),
    Preference(
        lambda case: (
            case.transport == "tcp"
            and case.size <= 8
            and case.bytes <= DIRECT_LINKS_BYTES
            and case.kind not in ("reduce", "broadcast")
        ),
        "direct",
        "over links no rank waits for the one before it: two phases, whatever the number of ranks",
    ),
    Preference(
        lambda case: case.kind in ("reduce", "broadcast") and case.bytes <= 256 * 1024,
        "tree",
        "one rank has everything: ceil(log2 P) steps",
    ),
    Preference(
        lambda case: case.kind in ("reduce", "broadcast"),
        "ring",
        "one rank has everything: a chain of segments sends it once over every link",
    ),
    Preference(
        lambda case: case.bytes <= 64 * 1024 and case.size & (case.size - 1) == 0,
        "halving",
        "latency counts: 2 log2 P steps, and all ranks work on a power of two",
    ),
    Preference(
        lambda case: case.bytes <= 16 * 1024,
        "tree",
        "latency counts: 2 ceil(log2 P) steps, whatever the number of ranks",
    ),
    Preference(
        lambda case: True, "ring", "bandwidth counts: the fewest bytes, only between neighbours, as one pipeline"
    ),
)


def choose(algorithm: str, case: Conditions, available: tuple[str, ...]) -> tuple[str, str]:
    """The algorithm to run and why: ``algorithm`` itself if it was named, else the first row of the table that applies.
    UsageError for a name that does not exist."""
    if algorithm != "auto":
        if algorithm not in available:
            raise UsageError(f"unknown algorithm {algorithm!r}; there are auto, {', '.join(available)}")
        return algorithm, "named by the caller"
    row = next(row for row in TABLE if row.applies(case))
    return row.algorithm, row.reason
