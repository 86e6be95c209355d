"""Pictures of training: where a step's time goes, scaling over ranks and hosts, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..core import results
from .collectives import WIDTH_IN, Drawn, Plot, Run, dress, file_name, grouped, legend_beside, panel, runs_of

_PHASES = {"compute": "#9aa5b1", "exchange": "#c0392b", "update": "#e0a21e"}
_STRATEGIES = {
    "single": "#444444",
    "ps": "#e08a1e",
    "dps": "#0b4f9e",
    "dps 16-bit": "#5aa7e0",
    "allreduce": "#1b9e77",
    "horovod": "#a0399b",
    "horovod 16-bit": "#d090cc",
    "ddp": "#c0392b",
    "gloo": "#8a8a8a",
}
_TRAINING = ("model", "batch_size", "seq_len", "steps", "hosts", "rate")


def train_key(run: dict[str, Any], row: dict[str, Any]) -> tuple[Any, ...] | None:
    """What makes rows of bench.train comparable; None for rows of another benchmark."""
    # bench.straggler's rows are of training too, with other columns.
    if row.get("op") != "train" or not ("missing" in row or "compute_ms" in row):
        return None
    hardware = run["hardware"]
    place = (hardware["cpu"], hardware["cores"], run["versions"]["mpi"])
    return (*(run.get("training", {}).get(name) for name in _TRAINING), *place)


def described(key: tuple[Any, ...]) -> str:
    """A key in words."""
    model, batch, seq_len, _, hosts, rate, _, _, mpi = key
    length = f" of {seq_len} tokens" if seq_len else ""
    place = f"{hosts} hosts at {rate}" if hosts else "one machine"
    return f"{model}, {batch} sequences{length} a step, {place}, {mpi}"


def _short(key: tuple[Any, ...]) -> str:
    model, batch, seq_len, _, hosts, rate, _, _, mpi = key
    return file_name(model, batch, seq_len, f"{hosts}-hosts-{rate}" if hosts else None, mpi)


def latest(drawn: Sequence[Drawn]) -> dict[int, dict[str, dict[str, Any]]]:
    """Rows by ranks and strategy; of two measurements the last one counts."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for _, row in drawn:
        found.setdefault(row["ranks"], {})[row["contestant"]] = row
    return dict(sorted(found.items()))


def train_plots(runs: Sequence[Run]) -> list[Plot]:
    """All pictures of bench.train's rows."""
    groups = grouped(runs, train_key)
    found = []
    for key, drawn in groups.items():
        by_ranks = latest(drawn)
        if any("missing" not in row for rows in by_ranks.values() for row in rows.values()):
            found += [_times(key, drawn, by_ranks), *_scaling(key, drawn, by_ranks), _memory(key, drawn, by_ranks)]
    return found + _hosts(groups)


def _titled(ranks: int, rows: dict[str, dict[str, Any]]) -> str:
    nodes = {row["nodes"] for row in rows.values() if "nodes" in row} - {1}
    return f"{ranks} rank{'s' * (ranks > 1)}" + (f" on {max(nodes)} hosts" if nodes else "")


def _stacked(by_ranks: dict[int, dict[str, dict[str, Any]]]) -> tuple[Figure, Any]:
    """A figure with a panel per number of ranks, as high as it has rows."""
    heights = [len(rows) + 0.8 for rows in by_ranks.values()]
    figure = Figure(figsize=(WIDTH_IN, 0.7 + 0.28 * sum(heights) + 0.3 * len(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (ranks, rows) in zip(panels, by_ranks.items(), strict=True):
        dress(axes, _titled(ranks, rows))
        axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(False, axis="y")
        for at, row in enumerate(rows.values()):
            if "missing" in row:
                _note(axes, 0.0, at, f"missing: {_cut(row['missing'])}", colour="#888888")
    return figure, panels


def _cut(text: str, most: int = 100) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= most else line[: most - 1] + "…"


def _note(axes: Axes, x: float, y: float, text: str, colour: str = "#222222") -> None:
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=colour)


def _times(key: tuple[Any, ...], drawn: Sequence[Drawn], by_ranks: dict[int, dict[str, dict[str, Any]]]) -> Plot:
    figure, panels = _stacked(by_ranks)
    labelled: set[str] = set()
    for axes, rows in zip(panels, by_ranks.values(), strict=True):
        for at, row in enumerate(rows.values()):
            if "missing" in row:
                continue
            left = 0.0
            for phase, shade in _PHASES.items():
                value = row[f"{phase}_ms"]
                inferred = phase == "exchange" and row["exchange_is"] != "measured"
                axes.barh(
                    at,
                    value,
                    left=left,
                    color=shade,
                    hatch="////" if inferred else None,
                    edgecolor="white",
                    linewidth=0.5,
                    label=phase if phase not in labelled else None,
                )
                labelled.add(phase)
                left += value
            of_single = f", {row['speed_of_single'][0]:.2f} of single" if "speed_of_single" in row else ""
            wrong = ", loss WRONG" if row.get("wrong") else ""
            _note(axes, left, at, f"{row['tokens_per_s']:,.0f} tokens/s{of_single}{wrong}")
        axes.margins(x=0.45)
    panels[-1].set_xlabel("milliseconds per step")
    legend_beside(figure, next((axes for axes in panels if axes.get_legend_handles_labels()[0]), panels[0]))
    reading = (
        "Shorter is better. compute: forward and backward of the slowest rank. exchange: packing, sending, norm and"
        " pull. Hatched: Horovod and DDP exchange inside backward, so their compute is that of another strategy in the"
        " same round, and exchange what their step takes longer. of single: speed against one rank that has all cores."
    )
    return Plot(f"time-{_short(key)}", f"Time of a step: {described(key)}", reading, figure, runs_of(drawn))


def _memory(key: tuple[Any, ...], drawn: Sequence[Drawn], by_ranks: dict[int, dict[str, dict[str, Any]]]) -> Plot:
    figure, panels = _stacked(by_ranks)
    for axes, rows in zip(panels, by_ranks.values(), strict=True):
        for at, (name, row) in enumerate(rows.items()):
            if "missing" not in row:
                mib = row["memory_bytes"] / 2**20
                axes.barh(at, mib, color=_STRATEGIES.get(name, "#444444"))
                _note(axes, mib, at, f"{mib:,.0f} MiB")
        axes.margins(x=0.15)
    panels[-1].set_xlabel("MiB, all ranks together")
    reading = (
        "Shorter is better: memory of all ranks in the second step, at the end of forward or of backward, the larger."
        " Shares (PSS), so that pages of the window and of libraries count once."
    )
    return Plot(f"memory-{_short(key)}", f"Memory: {described(key)}", reading, figure, runs_of(drawn))


def _scaling(
    key: tuple[Any, ...], drawn: Sequence[Drawn], by_ranks: dict[int, dict[str, dict[str, Any]]]
) -> list[Plot]:
    speeds = {ranks: _speeds(rows) for ranks, rows in by_ranks.items()}
    if len({ranks for ranks, found in speeds.items() if found.keys() - {"single"}}) < 2:
        return []
    figure = _curves(speeds, "ranks")
    reading = (
        "Higher is better: tokens/s of the whole job, with the same global batch on any number of ranks. Dashed: one"
        " rank that has all cores of the machine."
    )
    return [Plot(f"scaling-{_short(key)}", f"Scaling: {described(key)}", reading, figure, runs_of(drawn))]


def _hosts(groups: dict[Any, list[Drawn]]) -> list[Plot]:
    """Scaling over hosts: what differs only in how many hosts there were, all with as many ranks on each."""
    places: dict[Any, dict[int, list[Drawn]]] = {}
    for (model, batch, seq_len, steps, _, rate, *place), drawn in groups.items():
        for each in drawn:
            nodes, ranks = each.row.get("nodes"), each.row["ranks"]
            if nodes and rate and each.row["contestant"] != "single":
                at = (model, batch, seq_len, steps, rate, ranks // nodes, *place)
                places.setdefault(at, {}).setdefault(nodes, []).append(each)
    found = []
    for (model, batch, seq_len, _, rate, per_host, *place), by_hosts in places.items():
        if len(by_hosts) < 2:
            continue
        speeds = {
            hosts: _speeds({each.row["contestant"]: each.row for each in by_hosts[hosts]}) for hosts in sorted(by_hosts)
        }
        title = f"Scaling over hosts: {model}, {batch} sequences a step, {per_host} per host, {rate}, {place[-1]}"
        name = file_name("hosts", model, batch, seq_len, per_host, rate, place[-1])
        reading = "Higher is better: tokens/s of the whole job, with the same global batch on any number of hosts."
        every = [each for drawn in by_hosts.values() for each in drawn]
        found.append(Plot(name, title, reading, _curves(speeds, "hosts"), runs_of(every)))
    return found


def _speeds(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {name: row["tokens_per_s"] for name, row in rows.items() if "missing" not in row}


def _curves(speeds: dict[int, dict[str, float]], what: str) -> Figure:
    """Tokens per second over ranks or hosts, a line per strategy; ``single`` as a level."""
    figure = Figure(figsize=(WIDTH_IN, 4.2), layout="constrained")
    axes = panel(figure)
    counts = sorted(count for count, found in speeds.items() if found.keys() - {"single"})
    for name in dict.fromkeys(name for found in speeds.values() for name in found):
        shade = _STRATEGIES.get(name, "#444444")
        if name == "single":
            axes.axhline(
                max(found[name] for found in speeds.values() if name in found), color=shade, ls="--", label=name
            )
            continue
        at = [count for count in counts if name in speeds[count]]
        axes.plot(at, [speeds[count][name] for count in at], color=shade, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(what)
    axes.set_ylabel("tokens/s")
    legend_beside(figure, axes)
    return figure


def step_plots(runs: Sequence[Run]) -> list[Plot]:
    """bench.step: exchange, clipping and update without forward and backward."""
    groups = grouped(
        runs,
        lambda run, row: (row["model"], row["ranks"], results.place(run)) if row.get("op") == "step" else None,
    )
    found = []
    for (model, ranks, mpi), drawn in groups.items():
        rows = {row["contestant"]: row for _, row in drawn}
        figure = Figure(figsize=(WIDTH_IN, 1.0 + 0.32 * len(rows)), layout="constrained")
        axes = panel(figure)
        for at, row in enumerate(rows.values()):
            samples_ms = [us / 1e3 for us in row["samples_us"]]
            middle = row["p50_us"] / 1e3
            shade = _STRATEGIES.get(row["contestant"].partition(":")[0], "#444444")
            axes.barh(at, middle, color=shade, alpha=0.5 if row["wire"] else 1)
            axes.plot([min(samples_ms), max(samples_ms)], [at, at], color="#222222", linewidth=1)
            against = row.get("ratio_best_peer")
            compared = f", {against[0]:.2f} of {row['best_peer']}" if against else ""
            _note(axes, max(middle, *samples_ms), at, f"{middle:,.1f} ms{compared}{', WRONG' * bool(row['wrong'])}")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.3)
        axes.set_xlabel("milliseconds")
        reading = "Shorter is better: the median, and a line from the fastest to the slowest. Paler: a 16-bit wire."
        title = f"Exchange, clipping and update of {model}, {ranks} ranks, {mpi}"
        found.append(Plot(file_name("step", model, ranks, mpi), title, reading, figure, runs_of(drawn)))
    return found
