"""The picture of bench.overlap: a step with and without overlap, and what the link allows."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from .collectives import WIDTH_IN, Plot, Run, dress, file_name, grouped, legend_beside, runs_of

_PARTS = {"compute": "#9aa5b1", "update": "#e0a21e", "exposed": "#c0392b"}


def overlap_plots(runs: Sequence[Run]) -> list[Plot]:
    """One for each model, number of tokens and of ranks, and link."""
    groups = grouped(
        runs,
        lambda run, row: (
            (row["model"], row["tokens"], row["ranks"], run.get("link_bytes_per_s"), run["versions"]["mpi"])
            if row.get("op") == "overlap"
            else None
        ),
    )
    found = []
    for (model, tokens, ranks, link, mpi), drawn in groups.items():
        rows = {(row["contestant"], row["overlap"]): row for _, row in drawn}
        figure = Figure(figsize=(WIDTH_IN, 1.0 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        dress(axes, "")
        for at, row in enumerate(rows.values()):
            left = 0.0
            for part, shade in _PARTS.items():
                value = row[f"{part}_ms"] / 1e3
                axes.barh(at, value, left=left, color=shade, label=part if at == 0 else None)
                left += value
            if "floor_ms" in row:
                needed = row["floor_ms"] / 1e3
                axes.barh(at + 0.36, needed, 0.08, color="#222222", label="the link's time" if at == 0 else None)
            hidden = f", {row['hidden'][0]:.0%} hidden" if "hidden" in row else ""
            text = f"{row['exposed_ms'] / 1e3:,.2f} s exposed{hidden}{', WRONG' * bool(row['wrong'])}"
            axes.annotate(text, (left, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [f"{name}, overlap {'on' if on else 'off'}" for name, on in rows])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.3)
        axes.set_xlabel("seconds")
        legend_beside(figure, axes)
        rate = f", {link * 8 / 1e6:g} Mbit/s" if link else ""
        reading = (
            "Shorter is better; medians. compute: forward and backward alone, with nothing sent. exposed: what the step"
            " takes longer than computing and updating. Black: the time of the link for the bytes that were sent."
        )
        title = f"Overlap: a step of {model}, {tokens} tokens per rank, {ranks} ranks{rate}, {mpi}"
        name = file_name("overlap", model, tokens, ranks, f"{link * 8 / 1e6:g}mbit" if link else None, mpi)
        found.append(Plot(name, title, reading, figure, runs_of(drawn)))
    return found
