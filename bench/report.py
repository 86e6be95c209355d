"""``python -m bench.report FILE.jsonl ...``: results as markdown tables, one per operation, number of ranks and MPI.

A cell is the median time; commlab's also has the ratio to the best peer of the same rounds (below 1 is faster).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from . import records
from .figures import format_bytes

_Table = tuple[str, str, int, str]


def tables(runs: Iterable[tuple[dict[str, Any], list[dict[str, Any]]]]) -> dict[_Table, dict[str, dict[int, str]]]:
    """Cells by table, contestant and bytes, in the order of the files; of two measurements the last one counts."""
    found: dict[_Table, dict[str, dict[int, str]]] = {}
    for run, rows in runs:
        for row in rows:
            cells = found.setdefault((row["op"], row["dtype"], row["ranks"], run["versions"]["mpi"]), {})
            cells.setdefault(_name(row), {})[row["bytes"]] = _cell(row)
    return found


def _name(row: dict[str, Any]) -> str:
    """``auto`` by itself: what it stands for changes with the size."""
    chosen = row.get("chosen")
    name: str = row["contestant"]
    return name.replace(f" = {chosen}", "", 1) if chosen else name


def _cell(row: dict[str, Any]) -> str:
    if "missing" in row:
        return "missing"
    ratio = f" ({row['ratio_best_peer'][0]:.2f})" if "ratio_best_peer" in row else ""
    chosen = f" {row['chosen']}" if "chosen" in row else ""
    return f"{_time(row['p50_us'])}{chosen}{ratio}" + (f" **{row['wrong']} wrong**" if row["wrong"] else "")


def _time(us: float) -> str:
    """Three digits, in the unit that suits them."""
    value, unit = (us, "us") if us < 1000 else (us / 1000, "ms")
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}" if value < 100 else f"{value:.0f} {unit}"


def markdown(table: _Table, cells: dict[str, dict[int, str]]) -> str:
    op, dtype, ranks, mpi = table
    sizes = sorted({size for row in cells.values() for size in row})
    lines = [
        f"{op} of {dtype}, {ranks} ranks, {mpi}",
        "",
        "| | " + " | ".join(map(format_bytes, sizes)) + " |",
        "|---" * (1 + len(sizes)) + "|",
        *(f"| {name} | " + " | ".join(row.get(size, "") for size in sizes) + " |" for name, row in cells.items()),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE.jsonl")
    try:
        runs = [run for path in parser.parse_args(argv).files for run in records.read(path)]
        found = tables(runs)
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.report: {error!r}" if isinstance(error, KeyError) else f"bench.report: {error}", file=sys.stderr)
        return 2
    for run in {(run["date"][:10], run["hardware"]["cpu"], run["hardware"]["cores"]) for run, _ in runs}:
        print("{}, {} with {} cores".format(*run))
    for table, cells in found.items():
        print(f"\n{markdown(table, cells)}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
