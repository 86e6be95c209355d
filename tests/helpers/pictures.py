"""Pictures and cost tables of docs/algorithms, drawn from the very schedules that run."""

from __future__ import annotations

from commlab.chunks import Range
from commlab.schedules import ALGORITHMS, compose
from commlab.schedules.step import Step, elements_sent, messages_sent

COST_SIZES = (2, 3, 4, 5, 8, 16)
_NUMEL = 240
"""Divisible by all of them, so that the table's fractions are those of the formula."""


def steps_of(name: str, size: int, numel: int) -> list[list[Step]]:
    """Every rank's steps of an allreduce of ``numel`` elements."""
    plans = [compose.allreduce(ALGORITHMS[name], rank, size, numel) for rank in range(size)]
    return [[item for item in plan if isinstance(item, Step)] for plan in plans]


def timeline(plans: list[list[Step]]) -> list[dict[int, Step]]:
    """What each rank does in each message time: a rank does one step at a time, and a message takes one unit."""
    clock, at = [0] * len(plans), [0] * len(plans)
    sent: dict[tuple[int, int], list[int]] = {}
    rows: list[dict[int, Step]] = []
    posted: set[tuple[int, int]] = set()
    while any(at[rank] < len(plan) for rank, plan in enumerate(plans)):
        before = list(at), len(posted)
        for rank, plan in enumerate(plans):
            if at[rank] == len(plan):
                continue
            item, begin = plan[at[rank]], clock[rank]
            if item.to is not None and (rank, at[rank]) not in posted:
                posted.add((rank, at[rank]))
                sent.setdefault((rank, item.to), []).append(begin)
            if item.frm is not None:
                if not sent.get((item.frm, rank)):
                    continue
                begin = max(begin, sent[item.frm, rank].pop(0))
            rows += [{} for _ in range(begin + 1 - len(rows))]
            rows[begin][rank] = item
            clock[rank], at[rank] = begin + 1, at[rank] + 1
        assert (at, len(posted)) != before, "the schedules do not fit together"
    return rows


def _part(part: Range) -> str:
    return str(part.start) if part.numel == 1 else f"{part.start}-{part.stop - 1}"


def _cell(item: Step | None) -> str:
    if item is None:
        return ""
    sent = f"{_part(item.send)}>{item.to}" if item.to is not None else ""
    received = f"{'+' if item.reduce else '='}{_part(item.recv)}<{item.frm}" if item.frm is not None else ""
    return f"{sent} {received}".strip()


def picture(name: str, size: int) -> str:
    """An allreduce of as many numbers as ranks, one row per message time."""
    rows = timeline(steps_of(name, size, size))
    cells = [["step", *(f"rank {rank}" for rank in range(size))]]
    cells += [[str(at), *(_cell(row.get(rank)) for rank in range(size))] for at, row in enumerate(rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def costs(name: str) -> str:
    """A Markdown table: message times, messages of all ranks, and the numbers sent by the rank that sends most."""
    lines = ["| ranks | steps | messages, all ranks | sent by the busiest rank |", "|---|---|---|---|"]
    for size in COST_SIZES:
        plans = steps_of(name, size, _NUMEL)
        messages = sum(map(messages_sent, plans))
        most = max(map(elements_sent, plans)) / _NUMEL
        lines.append(f"| {size} | {len(timeline(plans))} | {messages} | {most:.4g} n |")
    return "\n".join(lines)
