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

from .core import program, results
from .core.results import Record, Run, plain_name, setting
from .core.stats import format_bytes
from .pictures import needs_matplotlib
from .training import rows as paper

if TYPE_CHECKING:
    from .pictures.page import Table
    from .pictures.plot import Plot

NAME = "bench.report"
RESULTS = Path(__file__).parent / "results"

Operation = tuple[str, str, int, str]
"""What a table of collectives is about: the operation, the dtype, the number of ranks, and the setting."""
Cells = dict[str, dict[int, str]]
"""The cells of a table of collectives, by contestant and bytes."""
Shaped = tuple[Sequence[str], list[list[str]]]
"""The head and the rows of a table."""


def tables(runs: Iterable[Run]) -> dict[Operation, Cells]:
    """The tables of all records of collectives, in the order of the files; of two measurements the last one counts."""
    found: dict[Operation, Cells] = {}
    for about, records in runs:
        for record in filter(_is_collective, records):
            cells = found.setdefault((record["op"], record["dtype"], record["ranks"], setting(about)), {})
            cells.setdefault(plain_name(record), {})[record["bytes"]] = _cell(record)
    return found


def _cell(record: Record) -> str:
    if "missing" in record:
        return "missing"
    ratio = f" ({record['ratio_best_peer'][0]:.2f})" if "ratio_best_peer" in record else ""
    chosen = f" {record['chosen']}" if "chosen" in record else ""
    return f"{_time(record['p50_us'])}{chosen}{ratio}" + (f" **{record['wrong']} wrong**" if record["wrong"] else "")


def _time(us: float) -> str:
    """Three digits, in the unit that suits them."""
    value, unit = (us, "us") if us < 1000 else (us / 1000, "ms")
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}" if value < 100 else f"{value:.0f} {unit}"


def markdown(operation: Operation, cells: Cells) -> str:
    op, dtype, ranks, mpi = operation
    sizes = sorted({size for row in cells.values() for size in row})
    lines = [
        f"{op} of {dtype}, {ranks} ranks, {mpi}",
        "",
        "| | " + " | ".join(map(format_bytes, sizes)) + " |",
        "|---" * (1 + len(sizes)) + "|",
        *(f"| {name} | " + " | ".join(row.get(size, "") for size in sizes) + " |" for name, row in cells.items()),
    ]
    return "\n".join(lines) + "\n"


def train_table(records: Sequence[Record]) -> Shaped:
    """The columns of bench.train itself; the third cell of a missing record says why it is missing."""
    return paper.HEAD, [
        paper.cells(record)
        if "missing" not in record
        else [record["contestant"], str(record["ranks"]), f"missing: {record['missing']}"]
        for record in records
    ]


def plain_table(records: Sequence[Record]) -> Shaped:
    """Records of any form: their numbers, words and truth values by name; lists are left out."""
    head = tuple(
        dict.fromkeys(
            name
            for record in records
            for name, value in record.items()
            if name != "type" and isinstance(value, (str, int, float, bool))
        )
    )
    return head, [[_plain(record.get(name)) for name in head] for record in records]


def _plain(value: Any) -> str:
    if value is None or isinstance(value, (list, dict)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_collective(record: Record) -> bool:
    return {"op", "dtype", "bytes", "contestant"} <= record.keys()


def _others(runs: Iterable[Run]) -> dict[str, tuple[list[Record], list[Record]]]:
    """(run lines, records) that are not of collectives, by benchmark."""
    found: dict[str, tuple[list[Record], list[Record]]] = {}
    for about, records in runs:
        rest = [record for record in records if not _is_collective(record)]
        if rest:
            kept = found.setdefault(about["bench"], ([], []))
            kept[0].append(about)
            kept[1].extend({"ranks": about.get("ranks", ""), **record} for record in rest)
    return found


def _shaped(bench: str, records: Sequence[Record]) -> Shaped:
    return train_table(records) if bench == "bench.train" else plain_table(records)


def as_markdown(runs: Sequence[Run]) -> str:
    machines = dict.fromkeys(
        (about["date"][:10], about["hardware"]["cpu"], about["hardware"]["cores"]) for about, _ in runs
    )
    paragraphs = ["\n".join("{}, {} with {} cores".format(*machine) for machine in machines) + "\n"]
    paragraphs += [markdown(operation, cells) for operation, cells in tables(runs).items()]
    for bench, (_, records) in _others(runs).items():
        head, body = _shaped(bench, records)
        lines = [head, ["---"] * len(head), *(row + [""] * (len(head) - len(row)) for row in body)]
        paragraphs.append(f"{bench}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(paragraphs)


def drawn(runs: Sequence[Run]) -> tuple[list[Plot], list[Table]]:
    """Every picture and every table that these results make."""
    import matplotlib

    from .pictures.collectives import accuracies, bandwidths
    from .pictures.overlap import overlap_plots
    from .pictures.page import Table
    from .pictures.plot import SETTINGS
    from .pictures.training import step_plots, train_plots

    with matplotlib.rc_context(SETTINGS):
        plots = [*bandwidths(runs), *train_plots(runs), *step_plots(runs), *overlap_plots(runs), *accuracies(runs)]
    found = []
    for operation, cells in tables(runs).items():
        op, dtype, ranks, mpi = operation
        sizes = sorted({size for row in cells.values() for size in row})
        body = [[name, *(row.get(size, "") for size in sizes)] for name, row in cells.items()]
        title = f"Times: {op} of {dtype}, {ranks} ranks, {mpi} (ratio to the best peer)"
        sources = [
            about
            for about, records in runs
            if setting(about) == mpi
            and any(
                (record["op"], record["dtype"], record["ranks"]) == operation[:3]
                for record in filter(_is_collective, records)
            )
        ]
        found.append(Table(title, ["", *map(format_bytes, sizes)], body, sources))
    for bench, (sources, records) in _others(runs).items():
        found.append(Table(f"Rows of {bench}", *_shaped(bench, records), sources))
    return plots, found


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE.jsonl", help="default: all of bench/results")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with all pictures and tables")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write each picture as a PNG")


def main(argv: Sequence[str] | None = None) -> int:
    options = program.parser(NAME, __doc__, arguments).parse_args(argv)
    try:
        runs = [run for path in options.files or sorted(RESULTS.glob("*.jsonl")) for run in results.read(path)]
        if not runs:
            raise ValueError("no results: no file is named, and bench/results has none")
        if options.html is None and options.png is None:
            print(as_markdown(runs), end="")
            return 0
        _write(runs, options.html, options.png)
    except (OSError, ValueError, KeyError) as error:
        return program.refuse(NAME, error)
    except ImportError as error:
        return program.refuse(NAME, needs_matplotlib(error))
    return 0


def _write(runs: Sequence[Run], html: Path | None, png: Path | None) -> None:
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
