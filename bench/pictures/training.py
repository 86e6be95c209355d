"""Pictures of training: where a step's time goes, scaling over ranks and hosts, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..core.results import Record, Run, setting
from .plot import WIDTH_IN, Drawn, Plot, dress, file_name, grouped, legend_beside, panel, sources_of

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


def train_key(about: Record, record: Record) -> tuple[Any, ...] | None:
    """Equal for records of bench.train that can be compared; None for records of another benchmark."""
    # Records of bench.straggler are of training too, with other columns.
    if record.get("op") != "train" or not ("missing" in record or "compute_ms" in record):
        return None
    hardware = about["hardware"]
    machine = (hardware["cpu"], hardware["cores"], about["versions"]["mpi"])
    return (*(about.get("training", {}).get(name) for name in _TRAINING), *machine)


def described(key: tuple[Any, ...]) -> str:
    """A key in words."""
    model, batch, seq_len, _, hosts, rate, _, _, mpi = key
    length = f" of {seq_len} tokens" if seq_len else ""
    machines = f"{hosts} hosts at {rate}" if hosts else "one machine"
    return f"{model}, {batch} sequences{length} a step, {machines}, {mpi}"


def _short(key: tuple[Any, ...]) -> str:
    model, batch, seq_len, _, hosts, rate, _, _, mpi = key
    return file_name(model, batch, seq_len, f"{hosts}-hosts-{rate}" if hosts else None, mpi)


def latest(drawn: Sequence[Drawn]) -> dict[int, dict[str, Record]]:
    """Records by ranks and strategy; of two measurements the last one counts."""
    found: dict[int, dict[str, Record]] = {}
    for _, record in drawn:
        found.setdefault(record["ranks"], {})[record["contestant"]] = record
    return dict(sorted(found.items()))


def train_plots(runs: Sequence[Run]) -> list[Plot]:
    """All pictures of records of bench.train."""
    groups = grouped(runs, train_key)
    found = []
    for key, drawn in groups.items():
        by_ranks = latest(drawn)
        if any("missing" not in record for records in by_ranks.values() for record in records.values()):
            found += [_times(key, drawn, by_ranks), *_scaling(key, drawn, by_ranks), _memory(key, drawn, by_ranks)]
    return found + _hosts(groups)


def _titled(ranks: int, records: dict[str, Record]) -> str:
    nodes = {record["nodes"] for record in records.values() if "nodes" in record} - {1}
    return f"{ranks} rank{'s' * (ranks > 1)}" + (f" on {max(nodes)} hosts" if nodes else "")


def _stacked(by_ranks: dict[int, dict[str, Record]]) -> tuple[Figure, Any]:
    """A figure with a panel per number of ranks, as high as the panels have records."""
    heights = [len(records) + 0.8 for records in by_ranks.values()]
    figure = Figure(figsize=(WIDTH_IN, 0.7 + 0.28 * sum(heights) + 0.3 * len(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (ranks, records) in zip(panels, by_ranks.items(), strict=True):
        dress(axes, _titled(ranks, records))
        axes.set_yticks(range(len(records)), list(records), fontsize=9)
        axes.set_ylim(len(records) - 0.4, -0.6)
        axes.grid(False, axis="y")
        for at, record in enumerate(records.values()):
            if "missing" in record:
                _note(axes, 0.0, at, f"missing: {_cut(record['missing'])}", colour="#888888")
    return figure, panels


def _cut(text: str, most: int = 100) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= most else line[: most - 1] + "…"


def _note(axes: Axes, x: float, y: float, text: str, colour: str = "#222222") -> None:
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=colour)


def _times(key: tuple[Any, ...], drawn: Sequence[Drawn], by_ranks: dict[int, dict[str, Record]]) -> Plot:
    figure, panels = _stacked(by_ranks)
    labelled: set[str] = set()
    for axes, records in zip(panels, by_ranks.values(), strict=True):
        for at, record in enumerate(records.values()):
            if "missing" in record:
                continue
            left = 0.0
            for phase, shade in _PHASES.items():
                value = record[f"{phase}_ms"]
                inferred = phase == "exchange" and record["exchange_is"] != "measured"
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
            of_single = f", {record['speed_of_single'][0]:.2f} of single" if "speed_of_single" in record else ""
            wrong = ", loss WRONG" if record.get("wrong") else ""
            _note(axes, left, at, f"{record['tokens_per_s']:,.0f} tokens/s{of_single}{wrong}")
        axes.margins(x=0.45)
    panels[-1].set_xlabel("milliseconds per step")
    legend_beside(figure, next((axes for axes in panels if axes.get_legend_handles_labels()[0]), panels[0]))
    reading = (
        "Shorter is better. compute: forward and backward of the slowest rank. exchange: packing, sending, norm and"
        " pull. Hatched: Horovod and DDP exchange inside backward, so their compute is that of another strategy in the"
        " same round, and exchange what their step takes longer. of single: speed against one rank that has all cores."
    )
    return Plot(f"time-{_short(key)}", f"Time of a step: {described(key)}", reading, figure, sources_of(drawn))


def _memory(key: tuple[Any, ...], drawn: Sequence[Drawn], by_ranks: dict[int, dict[str, Record]]) -> Plot:
    figure, panels = _stacked(by_ranks)
    for axes, records in zip(panels, by_ranks.values(), strict=True):
        for at, (name, record) in enumerate(records.items()):
            if "missing" not in record:
                mib = record["memory_bytes"] / 2**20
                axes.barh(at, mib, color=_STRATEGIES.get(name, "#444444"))
                _note(axes, mib, at, f"{mib:,.0f} MiB")
        axes.margins(x=0.15)
    panels[-1].set_xlabel("MiB, all ranks together")
    reading = (
        "Shorter is better: memory of all ranks in the second step, at the end of forward or of backward, the larger."
        " Shares (PSS), so that pages of the window and of libraries count once."
    )
    return Plot(f"memory-{_short(key)}", f"Memory: {described(key)}", reading, figure, sources_of(drawn))


def _scaling(key: tuple[Any, ...], drawn: Sequence[Drawn], by_ranks: dict[int, dict[str, Record]]) -> list[Plot]:
    speeds = {ranks: _speeds(records) for ranks, records in by_ranks.items()}
    if len({ranks for ranks, found in speeds.items() if found.keys() - {"single"}}) < 2:
        return []
    figure = _curves(speeds, "ranks")
    reading = (
        "Higher is better: tokens/s of the whole job, with the same global batch on any number of ranks. Dashed: one"
        " rank that has all cores of the machine."
    )
    return [Plot(f"scaling-{_short(key)}", f"Scaling: {described(key)}", reading, figure, sources_of(drawn))]


def _hosts(groups: dict[Any, list[Drawn]]) -> list[Plot]:
    """Scaling over hosts: a picture for records that differ only in the number of hosts, with as many ranks on each."""
    series: dict[Any, dict[int, list[Drawn]]] = {}
    for (model, batch, seq_len, steps, _, rate, *machine), drawn in groups.items():
        for each in drawn:
            nodes, ranks = each.record.get("nodes"), each.record["ranks"]
            if nodes and rate and each.record["contestant"] != "single":
                at = (model, batch, seq_len, steps, rate, ranks // nodes, *machine)
                series.setdefault(at, {}).setdefault(nodes, []).append(each)
    found = []
    for (model, batch, seq_len, _, rate, per_host, *machine), by_hosts in series.items():
        if len(by_hosts) < 2:
            continue
        speeds = {
            hosts: _speeds({each.record["contestant"]: each.record for each in by_hosts[hosts]})
            for hosts in sorted(by_hosts)
        }
        title = f"Scaling over hosts: {model}, {batch} sequences a step, {per_host} per host, {rate}, {machine[-1]}"
        name = file_name("hosts", model, batch, seq_len, per_host, rate, machine[-1])
        reading = "Higher is better: tokens/s of the whole job, with the same global batch on any number of hosts."
        every = [each for drawn in by_hosts.values() for each in drawn]
        found.append(Plot(name, title, reading, _curves(speeds, "hosts"), sources_of(every)))
    return found


def _speeds(records: dict[str, Record]) -> dict[str, float]:
    return {name: record["tokens_per_s"] for name, record in records.items() if "missing" not in record}


def _curves(speeds: dict[int, dict[str, float]], over: str) -> Figure:
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
    axes.set_xlabel(over)
    axes.set_ylabel("tokens/s")
    legend_beside(figure, axes)
    return figure


def step_key(about: Record, record: Record) -> tuple[str, int, str] | None:
    """Equal for records of bench.step that can be compared; None for records of another benchmark."""
    return (record["model"], record["ranks"], setting(about)) if record.get("op") == "step" else None


def step_plots(runs: Sequence[Run]) -> list[Plot]:
    """The pictures of bench.step: exchange, clipping and update without forward and backward."""
    groups = grouped(runs, step_key)
    found = []
    for (model, ranks, mpi), drawn in groups.items():
        records = {record["contestant"]: record for _, record in drawn}
        figure = Figure(figsize=(WIDTH_IN, 1.0 + 0.32 * len(records)), layout="constrained")
        axes = panel(figure)
        for at, record in enumerate(records.values()):
            samples_ms = [us / 1e3 for us in record["samples_us"]]
            middle = record["p50_us"] / 1e3
            shade = _STRATEGIES.get(record["contestant"].partition(":")[0], "#444444")
            axes.barh(at, middle, color=shade, alpha=0.5 if record["wire"] else 1)
            axes.plot([min(samples_ms), max(samples_ms)], [at, at], color="#222222", linewidth=1)
            against = record.get("ratio_best_peer")
            compared = f", {against[0]:.2f} of {record['best_peer']}" if against else ""
            _note(axes, max(middle, *samples_ms), at, f"{middle:,.1f} ms{compared}{', WRONG' * bool(record['wrong'])}")
        axes.set_yticks(range(len(records)), list(records))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.3)
        axes.set_xlabel("milliseconds")
        reading = "Shorter is better: the median, and a line from the fastest to the slowest. Paler: a 16-bit wire."
        title = f"Exchange, clipping and update of {model}, {ranks} ranks, {mpi}"
        found.append(Plot(file_name("step", model, ranks, mpi), title, reading, figure, sources_of(drawn)))
    return found
