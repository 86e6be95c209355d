"""The picture of bench.overlap: a step with and without overlap, and what the link allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ..core.results import Record, Run
from .plot import WIDTH_IN, Plot, dress, file_name, grouped, legend_beside, sources_of

_PHASES = {"compute": "#9aa5b1", "update": "#e0a21e", "exposed": "#c0392b"}


def overlap_key(about: Record, record: Record) -> tuple[Any, ...] | None:
    """Equal for records of bench.overlap that can be compared; None for records of another benchmark."""
    if record.get("op") != "overlap":
        return None
    link = about.get("link_bytes_per_s")
    return record["model"], record["tokens"], record["ranks"], link, about["versions"]["mpi"]


def overlap_plots(runs: Sequence[Run]) -> list[Plot]:
    """A picture for each model, number of tokens, number of ranks, and link."""
    groups = grouped(runs, overlap_key)
    found = []
    for (model, tokens, ranks, link, mpi), drawn in groups.items():
        records = {(record["contestant"], record["overlap"]): record for _, record in drawn}
        figure = Figure(figsize=(WIDTH_IN, 1.0 + 0.32 * len(records)), layout="constrained")
        axes = figure.subplots()
        dress(axes, "")
        for at, record in enumerate(records.values()):
            left = 0.0
            for phase, shade in _PHASES.items():
                value = record[f"{phase}_ms"] / 1e3
                axes.barh(at, value, left=left, color=shade, label=phase if at == 0 else None)
                left += value
            if "floor_ms" in record:
                needed = record["floor_ms"] / 1e3
                axes.barh(at + 0.36, needed, 0.08, color="#222222", label="the link's time" if at == 0 else None)
            hidden = f", {record['hidden'][0]:.0%} hidden" if "hidden" in record else ""
            text = f"{record['exposed_ms'] / 1e3:,.2f} s exposed{hidden}{', WRONG' * bool(record['wrong'])}"
            axes.annotate(text, (left, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(records)), [f"{name}, overlap {'on' if on else 'off'}" for name, on in records])
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
        found.append(Plot(name, title, reading, figure, sources_of(drawn)))
    return found
