"""``python -m bench.compare A.jsonl B.jsonl``: what got faster or slower from A to B, row by row, and what is noise.

Times of two launches on a shared machine can't be compared; ratios to a yardstick that ran in the same rounds can. The
rounds say how far off a median may be (bench.core.stats.ratio). A verdict needs the ranges of A and B to lie apart, and
a change beyond --least, because two launches differ by more than their rounds show.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from .core import program, results, table
from .core.results import Record
from .core.stats import Ratio, format_bytes, format_us, ratio

NAME = "bench.compare"
YARDSTICKS = ("auto", "peer", "floor", "time")
HEAD = ("", "contestant", "A", "range", "B", "range", "B / A", "verdict")
_SAME = ("op", "bytes", "dtype", "ranks", "transport", "wire", "check", "contestant")
_Key = tuple[Any, ...]


class Series(NamedTuple):
    """The rounds of one contestant on one piece of work, in one file."""

    samples_us: list[float]
    beside: dict[str, list[float]]
    """The samples of all contestants on this piece of work, by name."""
    kinds: dict[str, str]
    """The kinds of these contestants, by name."""
    missing: str
    """Why the contestant was not measured; empty where it was."""


class Change(NamedTuple):
    """One contestant on one piece of work, in both files."""

    key: _Key
    yardstick: str | None
    before: Ratio
    after: Ratio
    verdict: str
    """faster, slower, or same: the change does not stand out from the noise."""

    @property
    def factor(self) -> float:
        return self.after.median / self.before.median


def load(path: str, with_mpi: bool) -> dict[_Key, Series]:
    """The series of a file by contestant and piece of work; of two measurements the last one counts. ``with_mpi``:
    whether series of two MPIs are kept apart."""
    found: dict[_Key, Series] = {}
    for about, records in results.read(path):
        by_work: dict[_Key, list[Record]] = {}
        for record in records:
            by_work.setdefault(tuple(record.get(name) for name in _SAME[:4]), []).append(record)
        for record in records:
            group = by_work[tuple(record.get(name) for name in _SAME[:4])]
            beside = {other["contestant"]: other["samples_us"] for other in group if "samples_us" in other}
            kinds = {other["contestant"]: other.get("kind", "") for other in group}
            key = (about["versions"]["mpi"] if with_mpi else None, *(record.get(name) for name in _SAME))
            found[key] = Series(record.get("samples_us", []), beside, kinds, record.get("missing", ""))
    return found


def yardstick(one: Series, other: Series, wanted: str) -> str | None:
    """The contestant that the others on this piece of work are measured against: one that both files have. auto: the
    peer that was fastest in the first, else the floor, else none."""
    both = [name for name in one.beside if name in other.beside]
    for kind in {"auto": ("peer", "floor"), "time": ()}.get(wanted, (wanted,)):
        of_kind = [name for name in both if one.kinds[name] == kind]
        if of_kind:
            return min(of_kind, key=lambda name: median(one.beside[name]))
    return None


def compare(key: _Key, one: Series, other: Series, name: str | None, least: float) -> Change:
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


def differences(one: Sequence[Record], other: Sequence[Record]) -> Iterable[str]:
    """The differences between the ``run`` lines of two files in hardware and versions: reasons for a change that are
    not in the code."""
    for topic in ("hardware", "versions"):
        for name in one[0].get(topic, {}):
            before, after = (
                "; ".join(dict.fromkeys(str(about.get(topic, {}).get(name)) for about in sources))
                for sources in (one, other)
            )
            if before != after:
                yield f"{name}: {before} -> {after}"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A.jsonl")
    parser.add_argument("b", metavar="B.jsonl")
    parser.add_argument(
        "--against",
        choices=YARDSTICKS,
        default="auto",
        help="what a row's time is divided by (default: the fastest peer, else the floor)",
    )
    parser.add_argument(
        "--least", type=float, default=5.0, metavar="PERCENT", help="smaller changes are no change (default 5)"
    )
    parser.add_argument(
        "--fail-above", type=float, metavar="PERCENT", help="exit with 1 if a row got slower by more, or is missing now"
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = program.parser(NAME, __doc__, arguments).parse_args(argv)
    try:
        sources = [[about for about, _ in results.read(path)] for path in (options.a, options.b)]
        with_mpi = any(len({about["versions"]["mpi"] for about in each}) > 1 for each in sources)
        before, after = load(options.a, with_mpi), load(options.b, with_mpi)
    except (OSError, ValueError, KeyError) as error:
        return program.refuse(NAME, error)
    shared = [key for key in before if key in after and before[key].samples_us and after[key].samples_us]
    if not shared:
        return program.refuse(NAME, f"{options.a} and {options.b} have no row in common")
    for line in differences(*sources):
        print(line)
    against = {key: yardstick(before[key], after[key], options.against) for key in shared}
    changes = [
        compare(key, before[key], after[key], against[key], options.least / 100)
        for key in shared
        if against[key] != key[-1]
    ]
    print(table.render(HEAD, list(_cells(changes, before, after)), left=(0, 1, 7)))
    alone = [
        f"only in {file}: {len(keys)} rows"
        for file, keys in (("A", before.keys() - after), ("B", after.keys() - before))
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


def _cells(changes: Sequence[Change], before: dict[_Key, Series], after: dict[_Key, Series]) -> Iterable[list[str]]:
    """A table row per change; a headline for each new piece of work, with the yardstick's own times."""
    last: _Key = ()
    for change in changes:
        mpi, op, size_bytes, dtype, ranks = change.key[:5]
        if last != change.key[:5]:
            last = change.key[:5]
            unit = "us"
            if change.yardstick:
                own_us = [median(series[change.key].beside[change.yardstick]) for series in (before, after)]
                in_a, in_b = (format_us(each / 1e6) for each in own_us)
                unit = f"time / {change.yardstick} ({in_a} us in A, {in_b} us in B)"
            yield []
            yield [f"{op}, {format_bytes(size_bytes)} of {dtype}, {ranks} ranks{f', {mpi}' if mpi else ''}; {unit}"]
        ratios = [
            cell
            for found in (change.before, change.after)
            for cell in (f"{found.median:.4g}", f"{found.low:.3g}-{found.high:.3g}")
        ]
        yield ["", change.key[-1], *ratios, f"{change.factor:.3f}", "" if change.verdict == "same" else change.verdict]


if __name__ == "__main__":
    sys.exit(main())
