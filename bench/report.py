"""``python -m bench.report [FILE.jsonl ...]``: results as markdown tables, one per operation, number of ranks and MPI;
with ``--html FILE`` as one page with pictures, with ``--png FOLDER`` as pictures alone.

    python -m bench.report                                    all of bench/results, as markdown
    python -m bench.report --html report.html                 the same as a page that needs no other file
    python -m bench.report --png pictures bench/results/allreduce-*.jsonl

A cell is the median time; commlab's also has the ratio to the best peer of the same rounds (below 1 is faster). Rows of
a benchmark that has no picture are shown as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core import results
from .core.stats import format_bytes
from .training import rows as train_rows

if TYPE_CHECKING:
    from .pictures.collectives import Plot
    from .pictures.page import Table

RESULTS = Path(__file__).parent / "results"

_Table = tuple[str, str, int, str]


def tables(runs: Iterable[tuple[dict[str, Any], list[dict[str, Any]]]]) -> dict[_Table, dict[str, dict[int, str]]]:
    """Cells by table, contestant and bytes, in the order of the files; of two measurements the last one counts. Only
    rows of collectives: others are of another form."""
    found: dict[_Table, dict[str, dict[int, str]]] = {}
    for run, rows in runs:
        for row in rows:
            if not {"op", "dtype", "bytes", "contestant"} <= row.keys():
                continue
            cells = found.setdefault((row["op"], row["dtype"], row["ranks"], results.place(run)), {})
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


def train_table(rows: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """bench.train's own columns; a row that is missing says why in its second."""
    return train_rows.HEAD, [
        train_rows.cells(row)
        if "missing" not in row
        else [row["contestant"], str(row["ranks"]), f"missing: {row['missing']}"]
        for row in rows
    ]


def plain_table(rows: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Rows of any form: what is a number, a word or a truth value, by name; lists are left out."""
    head = tuple(
        dict.fromkeys(
            name
            for row in rows
            for name, value in row.items()
            if name != "type" and isinstance(value, (str, int, float, bool))
        )
    )
    return head, [[_plain(row.get(name)) for name in head] for row in rows]


def _plain(value: Any) -> str:
    if value is None or isinstance(value, (list, dict)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_collective(row: dict[str, Any]) -> bool:
    return {"op", "dtype", "bytes", "contestant"} <= row.keys()


def _others(runs: Iterable[tuple[dict[str, Any], list[dict[str, Any]]]]) -> dict[str, tuple[list[Any], list[Any]]]:
    """(run lines, rows) that are not of collectives, by benchmark."""
    found: dict[str, tuple[list[Any], list[Any]]] = {}
    for run, rows in runs:
        rest = [row for row in rows if not _is_collective(row)]
        if rest:
            kept = found.setdefault(run["bench"], ([], []))
            kept[0].append(run)
            kept[1].extend({"ranks": run.get("ranks", ""), **row} for row in rest)
    return found


def _shaped(bench: str, rows: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    return train_table(rows) if bench == "bench.train" else plain_table(rows)


def as_markdown(runs: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]]) -> str:
    places = dict.fromkeys((run["date"][:10], run["hardware"]["cpu"], run["hardware"]["cores"]) for run, _ in runs)
    parts = ["\n".join("{}, {} with {} cores".format(*place) for place in places) + "\n"]
    parts += [markdown(table, cells) for table, cells in tables(runs).items()]
    for bench, (_, rows) in _others(runs).items():
        head, body = _shaped(bench, rows)
        lines = [head, ["---"] * len(head), *(row + [""] * (len(head) - len(row)) for row in body)]
        parts.append(f"{bench}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def drawn(runs: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]]) -> tuple[list[Plot], list[Table]]:
    """Every picture and every table that these results make."""
    import matplotlib

    from .pictures.collectives import SETTINGS, accuracies, bandwidths
    from .pictures.overlap import overlap_plots
    from .pictures.page import Table
    from .pictures.training import step_plots, train_plots

    with matplotlib.rc_context(SETTINGS):
        plots = [*bandwidths(runs), *train_plots(runs), *step_plots(runs), *overlap_plots(runs), *accuracies(runs)]
    found = []
    for table, cells in tables(runs).items():
        op, dtype, ranks, mpi = table
        sizes = sorted({size for row in cells.values() for size in row})
        body = [[name, *(row.get(size, "") for size in sizes)] for name, row in cells.items()]
        title = f"Times: {op} of {dtype}, {ranks} ranks, {mpi} (ratio to the best peer)"
        own = [
            run
            for run, rows in runs
            if results.place(run) == mpi
            and any(_is_collective(row) and (row["op"], row["dtype"], row["ranks"]) == table[:3] for row in rows)
        ]
        found.append(Table(title, ["", *map(format_bytes, sizes)], body, own))
    for bench, (own, rows) in _others(runs).items():
        found.append(Table(f"Rows of {bench}", *_shaped(bench, rows), own))
    return plots, found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE.jsonl", help="default: all of bench/results")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with all pictures and tables")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write each picture as a PNG")
    options = parser.parse_args(argv)
    try:
        runs = [run for path in options.files or sorted(RESULTS.glob("*.jsonl")) for run in results.read(path)]
        if not runs:
            raise ValueError("no results: no file is named, and bench/results has none")
        if options.html is None and options.png is None:
            print(as_markdown(runs), end="")
            return 0
        _write(runs, options.html, options.png)
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.report: {error!r}" if isinstance(error, KeyError) else f"bench.report: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"bench.report: pictures need matplotlib: pip install matplotlib ({error})", file=sys.stderr)
        return 2
    return 0


def _write(runs: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]], html: Path | None, png: Path | None) -> None:
    plots, found = drawn(runs)
    from .pictures.page import page, write_png

    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(plots, found), encoding="utf-8")
        print(f"{html}: {len(plots)} pictures, {len(found)} tables")
    if png is not None:
        for plot in plots:
            print(write_png(plot, png))


if __name__ == "__main__":
    sys.exit(main())
