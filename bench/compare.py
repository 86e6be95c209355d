"""``python -m bench.compare A.jsonl B.jsonl``: what got faster or slower from A to B, row by row, and what is noise.

Times of two launches on a shared machine can't be compared; ratios to a yardstick that ran in the same rounds can. The
rounds say how far off a median may be (bench.core.stats.ratio). A verdict needs the ranges of A and B to lie apart, and a
change beyond --least, because two launches differ by more than their rounds show.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from .core import results, table
from .core.stats import Ratio, format_bytes, format_us, ratio

YARDSTICKS = ("auto", "peer", "floor", "time")
HEAD = ("", "contestant", "A", "range", "B", "range", "B / A", "verdict")
_SAME = ("op", "bytes", "dtype", "ranks", "transport", "wire", "check", "contestant")
_Key = tuple[Any, ...]


class Measured(NamedTuple):
    """One contestant on one piece of work, in one file: its rounds, and those of the rows beside it by name."""

    samples_us: list[float]
    beside: dict[str, list[float]]
    kinds: dict[str, str]
    missing: str


class Change(NamedTuple):
    key: _Key
    yardstick: str | None
    before: Ratio
    after: Ratio
    verdict: str
    """faster, slower, or same: the change does not stand out from the noise."""

    @property
    def factor(self) -> float:
        return self.after.median / self.before.median


def load(path: str, with_mpi: bool) -> dict[_Key, Measured]:
    """Rows by what they measured; of rows measured twice the last one counts. ``with_mpi``: the MPI is part of it."""
    found: dict[_Key, Measured] = {}
    for run, rows in results.read(path):
        work: dict[_Key, list[dict[str, Any]]] = {}
        for row in rows:
            work.setdefault(tuple(row.get(name) for name in _SAME[:4]), []).append(row)
        for row in rows:
            group = work[tuple(row.get(name) for name in _SAME[:4])]
            beside = {other["contestant"]: other["samples_us"] for other in group if "samples_us" in other}
            kinds = {other["contestant"]: other.get("kind", "") for other in group}
            key = (run["versions"]["mpi"] if with_mpi else None, *(row.get(name) for name in _SAME))
            found[key] = Measured(row.get("samples_us", []), beside, kinds, row.get("missing", ""))
    return found


def yardstick(one: Measured, other: Measured, wanted: str) -> str | None:
    """The contestant that the others on this piece of work are measured against: one that both files have. auto: the
    peer that was fastest in the first, else the floor, else none."""
    both = [name for name in one.beside if name in other.beside]
    for kind in {"auto": ("peer", "floor"), "time": ()}.get(wanted, (wanted,)):
        of_kind = [name for name in both if one.kinds[name] == kind]
        if of_kind:
            return min(of_kind, key=lambda name: median(one.beside[name]))
    return None


def compare(key: _Key, one: Measured, other: Measured, name: str | None, least: float) -> Change:
    """``name``: the yardstick, or None for plain microseconds. ``least``: the smallest relative change that is one."""
    before, after = (
        ratio(each.samples_us, each.beside[name] if name else [1.0] * len(each.samples_us)) for each in (one, other)
    )
    change = Change(key, name, before, after, "same")
    if after.low > before.high and change.factor > 1 + least:
        return change._replace(verdict="slower")
    if after.high < before.low and change.factor < 1 / (1 + least):
        return change._replace(verdict="faster")
    return change


def differences(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> Iterable[str]:
    """What the runs say differently about hardware and versions: reasons for a change that are not in the code."""
    for part in ("hardware", "versions"):
        for name in one[0].get(part, {}):
            sides = [
                "; ".join(dict.fromkeys(str(run.get(part, {}).get(name)) for run in runs)) for runs in (one, other)
            ]
            if sides[0] != sides[1]:
                yield f"{name}: {sides[0]} -> {sides[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        runs = [[run for run, _ in results.read(path)] for path in (options.a, options.b)]
        with_mpi = any(len({run["versions"]["mpi"] for run in each}) > 1 for each in runs)
        before, after = load(options.a, with_mpi), load(options.b, with_mpi)
    except (OSError, ValueError, KeyError) as error:
        print(
            f"bench.compare: {error!r}" if isinstance(error, KeyError) else f"bench.compare: {error}", file=sys.stderr
        )
        return 2
    shared = [key for key in before if key in after and before[key].samples_us and after[key].samples_us]
    if not shared:
        print(f"bench.compare: {options.a} and {options.b} have no row in common", file=sys.stderr)
        return 2
    for line in differences(*runs):
        print(line)
    against = {key: yardstick(before[key], after[key], options.against) for key in shared}
    changes = [
        compare(key, before[key], after[key], against[key], options.least / 100)
        for key in shared
        if against[key] != key[-1]
    ]
    print(table.render(HEAD, list(_cells(changes, before, after)), left=(0, 1, 7)))
    alone = [
        f"only in {side}: {len(keys)} rows"
        for side, keys in (("A", before.keys() - after), ("B", after.keys() - before))
        if keys
    ]
    lost = [
        f"{key[-1]}: {after[key].missing}"
        for key in before
        if key in after and before[key].samples_us and after[key].missing
    ]
    counts = ", ".join(
        f"{sum(change.verdict == verdict for change in changes)} {verdict}" for verdict in ("faster", "slower", "same")
    )
    print("\n".join(["", counts, *alone, *dict.fromkeys(lost)]))
    failed = options.fail_above is not None and (
        lost or any(change.verdict == "slower" and change.factor > 1 + options.fail_above / 100 for change in changes)
    )
    return 1 if failed else 0


def _cells(changes: Sequence[Change], before: dict[_Key, Measured], after: dict[_Key, Measured]) -> Iterable[list[str]]:
    """A table row per change; a headline for each new piece of work, with the yardstick's own times."""
    last: _Key = ()
    for change in changes:
        mpi, op, size_bytes, dtype, ranks = change.key[:5]
        if last != change.key[:5]:
            last = change.key[:5]
            unit = "us"
            if change.yardstick:
                own_us = [median(side[change.key].beside[change.yardstick]) for side in (before, after)]
                in_a, in_b = (format_us(each / 1e6) for each in own_us)
                unit = f"time / {change.yardstick} ({in_a} us in A, {in_b} us in B)"
            yield []
            yield [f"{op}, {format_bytes(size_bytes)} of {dtype}, {ranks} ranks{f', {mpi}' if mpi else ''}; {unit}"]
        sides = [
            cell
            for side in (change.before, change.after)
            for cell in (f"{side.median:.4g}", f"{side.low:.3g}-{side.high:.3g}")
        ]
        yield ["", change.key[-1], *sides, f"{change.factor:.3f}", "" if change.verdict == "same" else change.verdict]


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("a", metavar="A.jsonl")
    found.add_argument("b", metavar="B.jsonl")
    found.add_argument(
        "--against",
        choices=YARDSTICKS,
        default="auto",
        help="what a row's time is divided by (default: the fastest peer, else the floor)",
    )
    found.add_argument(
        "--least", type=float, default=5.0, metavar="PERCENT", help="smaller changes are no change (default 5)"
    )
    found.add_argument(
        "--fail-above", type=float, metavar="PERCENT", help="exit with 1 if a row got slower by more, or is missing now"
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
