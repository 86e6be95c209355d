"""Pictures of single operations: bandwidth over size, and the accuracy of 16-bit wires."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ..contestants.case import OPS
from ..core.results import Record, Run, plain_name, setting
from ..core.stats import bus_factor, format_bytes
from .plot import (
    FLOOR_COLOUR,
    WIDTH_IN,
    Drawn,
    Plot,
    colour,
    dress,
    file_name,
    grouped,
    legend_beside,
    panel,
    sources_of,
)


def collective_key(about: Record, record: Record) -> tuple[str, str, int, str] | None:
    """Equal for records of bench.allreduce that can be compared; None for records of another benchmark."""
    if not {"op", "dtype", "bytes", "ranks", "contestant"} <= record.keys():
        return None
    return record["op"], record["dtype"], record["ranks"], setting(about)


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
        found.append(Plot(file_name("bandwidth", op, dtype, ranks, mpi), title, reading, figure, sources_of(drawn)))
    return found


def _lines(drawn: Sequence[Drawn]) -> dict[str, dict[int, Record]]:
    """Records by contestant and size, without the floor, missing contestants and measurements without the check; of two
    measurements the last one counts."""
    found: dict[str, dict[int, Record]] = {}
    for _, record in drawn:
        if record.get("kind") != "floor" and "missing" not in record and record.get("check") is not False:
            found.setdefault(plain_name(record), {})[record["bytes"]] = record
    return found


def _floor(axes: Axes, drawn: Sequence[Drawn]) -> None:
    latest = {
        (record["contestant"], record["bytes"]): record
        for _, record in drawn
        if record.get("kind") == "floor" and "missing" not in record
    }
    best: dict[int, float] = {}
    for (_, size), record in latest.items():
        best[size] = max(best.get(size, 0.0), size / record["p50_us"] * 1e6)
    about, any_record = drawn[0]
    if about.get("link_bytes_per_s") and any_record["op"] in OPS:
        # Between hosts memory is not what limits them.
        link = about["link_bytes_per_s"] / bus_factor(any_record["op"], about["hosts"])
        best = dict.fromkeys(best, link)
    if best:
        sizes = sorted(best)
        axes.plot(sizes, [best[size] for size in sizes], color=FLOOR_COLOUR, linewidth=5, alpha=0.5, label="floor")


def _line(axes: Axes, name: str, points: dict[int, Record]) -> None:
    sizes = sorted(points)
    records = [points[size] for size in sizes]
    any_record = records[0]
    rates = [size / record["p50_us"] * 1e6 for size, record in zip(sizes, records, strict=True)]
    samples = [[size / us * 1e6 for us in record["samples_us"]] for size, record in zip(sizes, records, strict=True)]
    around = [
        [rate - min(each) for rate, each in zip(rates, samples, strict=True)],
        [max(each) - rate for rate, each in zip(rates, samples, strict=True)],
    ]
    own, auto = any_record.get("kind") == "commlab", any_record.get("algorithm") == "auto"
    style = ":" if any_record.get("memory") == "window" else "--" if any_record.get("wire") else "-"
    axes.errorbar(
        sizes,
        rates,
        yerr=[[max(0.0, value) for value in reach] for reach in around],
        label=name + (" WRONG" if any(record["wrong"] for record in records) else ""),
        color=colour(any_record),
        linestyle=style,
        linewidth=2.4 if auto else 1.3,
        elinewidth=0.6,
        marker="o" if own else "s",
        markersize=4 if own else 3.5,
        zorder=4 if auto else 3,
    )


def _rate(value: float) -> str:
    for unit, scale in (("GB/s", 1e9), ("MB/s", 1e6), ("KB/s", 1e3)):
        if value >= scale * 0.999:
            return f"{value / scale:g} {unit}"
    return f"{value:g} B/s"


def accuracies(runs: Sequence[Run]) -> list[Plot]:
    """Errors of sums on 16-bit wires, in units of the least that one rounding costs."""
    key = "error_over_one_rounding"
    drawn = [
        each for group in grouped(runs, lambda _, record: True if key in record else None).values() for each in group
    ]
    if not drawn:
        return []
    latest: dict[tuple[str, str, Any], Record] = {
        (record["wire"], record["contestant"], record.get("ranks", about.get("ranks"))): record
        for about, record in drawn
        if "missing" not in record
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
            positions = [index + (at - (len(counts) - 1) / 2) * thickness for index, _ in shown]
            shade = ("#0b4f9e", "#5aa7e0", "#8dbb3c", "#c0392b")[at % 4]
            axes.barh(
                positions, [record[key] for _, record in shown], thickness * 0.9, color=shade, label=f"{ranks} ranks"
            )
            for position, (_, record) in zip(positions, shown, strict=True):
                overflows = not math.isfinite(record.get("mean_of_60000s", 0.0))
                text = f"{record[key]:.2f}" + (", overflows" if overflows else "")
                axes.annotate(
                    text, (record[key], position), (3, 0), textcoords="offset points", va="center", fontsize=7
                )
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
    return [Plot("accuracy", title, reading, figure, sources_of(drawn))]
