"""Pictures of result files: what every plot has in common, and those of single operations.

A plot is drawn on a Figure of its own, without pyplot and its global state. The same rows give the same picture, byte
for byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ..contestants.case import OPS
from ..core import results
from ..core.stats import bus_factor, format_bytes

Run = tuple[dict[str, Any], list[dict[str, Any]]]
"""A ``run`` line and its ``row`` lines."""

SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "commlab",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
}
"""Of matplotlib, while plots are made and written: its own font, and names in SVG that do not change."""

WIDTH_IN = 10.0
FLOOR_COLOUR = "#8a8a8a"
_COLOURS = {
    "auto": "#0b4f9e",
    "window": "#1b9e77",
    "ring": "#5aa7e0",
    "halving": "#35b0c4",
    "tree": "#8dbb3c",
    "direct": "#6a6fd0",
    "hierarchical": "#0f766e",
    "MPI_Allreduce in place": "#7b1f14",
    "MPI_": "#d9534a",
    "gloo": "#e08a1e",
    "Horovod": "#a0399b",
    "NCCL": "#76b900",
}
"""By algorithm, or by how a peer's name begins: the same colour in every plot."""


class Plot(NamedTuple):
    """``name``: of the file, without a suffix. ``reading``: what the reader has to know to read it. ``runs``: the run
    lines whose rows are drawn, in their order."""

    name: str
    title: str
    reading: str
    figure: Figure
    runs: Sequence[dict[str, Any]]


class Drawn(NamedTuple):
    """A row with the run that it is of."""

    run: dict[str, Any]
    row: dict[str, Any]


def grouped(runs: Iterable[Run], key: Any) -> dict[Any, list[Drawn]]:
    """Rows by ``key(run, row)``, in the order of the files; rows whose key is None are left out."""
    found: dict[Any, list[Drawn]] = {}
    for run, rows in runs:
        for row in rows:
            at = key(run, row)
            if at is not None:
                found.setdefault(at, []).append(Drawn(run, row))
    return found


def runs_of(drawn: Iterable[Drawn]) -> list[dict[str, Any]]:
    """Every run once, in order."""
    return list({id(each.run): each.run for each in drawn}.values())


def file_name(*parts: Any) -> str:
    """A name that every file system takes."""
    text = "-".join(str(part) for part in parts if part not in (None, ""))
    return "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in text).lower()


def panel(figure: Figure, title: str = "") -> Axes:
    axes = figure.add_subplot()
    dress(axes, title)
    return axes


def dress(axes: Axes, title: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)


def legend_beside(figure: Figure, axes: Axes) -> None:
    """Right of the panels, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)


def collective_key(run: dict[str, Any], row: dict[str, Any]) -> tuple[str, str, int, str] | None:
    """What makes rows of bench.allreduce comparable; None for rows of another benchmark."""
    if not {"op", "dtype", "bytes", "ranks", "contestant"} <= row.keys():
        return None
    return row["op"], row["dtype"], row["ranks"], results.place(run)


def plain_name(row: dict[str, Any]) -> str:
    """``auto`` by itself: what it stands for changes with the size."""
    chosen = row.get("chosen")
    name: str = row["contestant"]
    return name.replace(f" = {chosen}", "", 1) if chosen else name


def bandwidths(runs: Sequence[Run]) -> list[Plot]:
    """Bandwidth over size with the floor drawn in: one plot per operation, dtype, number of ranks and MPI."""
    found = []
    for (op, dtype, ranks, mpi), drawn in grouped(runs, collective_key).items():
        lines = _lines(drawn)
        if not lines:
            continue
        figure = Figure(figsize=(WIDTH_IN, 5.0), layout="constrained")
        axes = panel(figure)
        _floor(axes, drawn)
        for name, points in lines.items():
            _line(axes, name, points)
        sizes = sorted({size for points in lines.values() for size in points})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(round(value))))
        axes.xaxis.set_minor_locator(NullLocator())
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high < 100 * low else (1,), numticks=20))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _rate(value)))
        axes.tick_params(axis="x", labelrotation=45)
        axes.set_xlabel("size of the whole buffer")
        axes.set_ylabel("size / median time")
        legend_beside(figure, axes)
        reading = (
            "Higher is better; both axes are logarithmic. Bars reach from the slowest sample to the fastest. Dashed: a"
            " 16-bit wire; dotted: a tensor that lives in the window. The floor is the faster of two copies of the same"
            " bytes by all ranks at once; between hosts, what their links carry of numbers as they are."
        )
        title = f"Bandwidth: {op} of {dtype}, {ranks} ranks, {mpi}"
        found.append(Plot(file_name("bandwidth", op, dtype, ranks, mpi), title, reading, figure, runs_of(drawn)))
    return found


def _lines(drawn: Sequence[Drawn]) -> dict[str, dict[int, dict[str, Any]]]:
    """Rows by contestant and size, without the floor, what is missing, and what was measured without the check; of two
    measurements the last one counts."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for _, row in drawn:
        if row.get("kind") != "floor" and "missing" not in row and row.get("check") is not False:
            found.setdefault(plain_name(row), {})[row["bytes"]] = row
    return found


def _floor(axes: Axes, drawn: Sequence[Drawn]) -> None:
    latest = {
        (row["contestant"], row["bytes"]): row
        for _, row in drawn
        if row.get("kind") == "floor" and "missing" not in row
    }
    best: dict[int, float] = {}
    for (_, size), row in latest.items():
        best[size] = max(best.get(size, 0.0), size / row["p50_us"] * 1e6)
    run, any_row = drawn[0]
    if run.get("link_bytes_per_s") and any_row["op"] in OPS:
        # Between hosts memory is not what limits them.
        link = run["link_bytes_per_s"] / bus_factor(any_row["op"], run["hosts"])
        best = dict.fromkeys(best, link)
    if best:
        sizes = sorted(best)
        axes.plot(sizes, [best[size] for size in sizes], color=FLOOR_COLOUR, linewidth=5, alpha=0.5, label="floor")


def _line(axes: Axes, name: str, points: dict[int, dict[str, Any]]) -> None:
    sizes = sorted(points)
    rows = [points[size] for size in sizes]
    any_row = rows[0]
    rates = [size / row["p50_us"] * 1e6 for size, row in zip(sizes, rows, strict=True)]
    samples = [[size / us * 1e6 for us in row["samples_us"]] for size, row in zip(sizes, rows, strict=True)]
    around = [
        [rate - min(each) for rate, each in zip(rates, samples, strict=True)],
        [max(each) - rate for rate, each in zip(rates, samples, strict=True)],
    ]
    ours, auto = any_row.get("kind") == "commlab", any_row.get("algorithm") == "auto"
    style = ":" if any_row.get("memory") == "window" else "--" if any_row.get("wire") else "-"
    axes.errorbar(
        sizes,
        rates,
        yerr=[[max(0.0, value) for value in side] for side in around],
        label=name + (" WRONG" if any(row["wrong"] for row in rows) else ""),
        color=colour(any_row),
        linestyle=style,
        linewidth=2.4 if auto else 1.3,
        elinewidth=0.6,
        marker="o" if ours else "s",
        markersize=4 if ours else 3.5,
        zorder=4 if auto else 3,
    )


def colour(row: dict[str, Any]) -> str:
    if row.get("algorithm") in _COLOURS:
        return _COLOURS[row["algorithm"]]
    name = row.get("contestant", "")
    return next((shade for prefix, shade in _COLOURS.items() if name.startswith(prefix)), "#444444")


def _rate(value: float) -> str:
    for unit, scale in (("GB/s", 1e9), ("MB/s", 1e6), ("KB/s", 1e3)):
        if value >= scale * 0.999:
            return f"{value / scale:g} {unit}"
    return f"{value:g} B/s"


def accuracies(runs: Sequence[Run]) -> list[Plot]:
    """Errors of sums on 16-bit wires, in units of the least that one rounding costs."""
    key = "error_over_one_rounding"
    drawn = [each for group in grouped(runs, lambda _, row: key in row or None).values() for each in group]
    if not drawn:
        return []
    latest = {
        (row["wire"], row["contestant"], row.get("ranks", run.get("ranks"))): row
        for run, row in drawn
        if "missing" not in row
    }
    wires = sorted({wire for wire, _, _ in latest})
    names = list(dict.fromkeys(name for _, name, _ in latest))
    counts = sorted({ranks for _, _, ranks in latest})
    figure = Figure(figsize=(WIDTH_IN, 1.2 + 0.2 * len(names) * (len(counts) + 1)), layout="constrained")
    panels = figure.subplots(1, len(wires), sharey=True, sharex=True, squeeze=False)[0]
    thickness = 0.8 / len(counts)
    for axes, wire in zip(panels, wires, strict=True):
        dress(axes, f"wire {wire}")
        for at, ranks in enumerate(counts):
            shown = [
                (index, latest[wire, name, ranks]) for index, name in enumerate(names) if (wire, name, ranks) in latest
            ]
            places = [index + (at - (len(counts) - 1) / 2) * thickness for index, _ in shown]
            shade = ("#0b4f9e", "#5aa7e0", "#8dbb3c", "#c0392b")[at % 4]
            axes.barh(places, [row[key] for _, row in shown], thickness * 0.9, color=shade, label=f"{ranks} ranks")
            for place, (_, row) in zip(places, shown, strict=True):
                overflows = not math.isfinite(row.get("mean_of_60000s", 0.0))
                text = f"{row[key]:.2f}" + (", overflows" if overflows else "")
                axes.annotate(text, (row[key], place), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axes.set_xlabel("error / error of one rounding")
        axes.margins(x=0.18)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].invert_yaxis()
    legend_beside(figure, panels[0])
    reading = (
        "Shorter is better: root mean square error against float64, divided by that of rounding the exact result"
        " once. overflows: the mean of 60000s, which fp16 holds, came out infinite."
    )
    title = "Accuracy of sums on 16-bit wires"
    return [Plot("accuracy", title, reading, figure, runs_of(drawn))]
