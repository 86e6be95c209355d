"""Plots and tables as one HTML page that needs no other file, and plots as PNG files with their words around them."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

from ..core.results import Record
from .plot import SETTINGS, Plot

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 0 auto;
       padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 .3rem }
figure { margin: .5rem 0 } img { width: 100%; height: auto }
figcaption, .from { font-size: .85rem; color: #555; overflow-wrap: anywhere }
code { font: .82rem ui-monospace, monospace; background: #f4f4f4; padding: .1em .3em; overflow-wrap: anywhere }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .82rem; margin: .5rem 0 }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: left; font-variant-numeric: tabular-nums }
th { white-space: nowrap }
nav ul { columns: 2; padding-left: 1.2rem; font-size: .9rem } nav li { break-inside: avoid }
@media (max-width: 700px) { nav ul { columns: 1 } }
@media print { h2, figure { break-inside: avoid } }
"""


class Table(NamedTuple):
    """A table of text."""

    title: str
    head: Sequence[str]
    """The names of the columns."""
    rows: Sequence[Sequence[str]]
    sources: Sequence[Record]
    """The ``run`` lines whose records are shown."""


def origin(about: Record) -> str:
    """Date, hardware and versions of a run, in one line."""
    hardware, versions = about.get("hardware", {}), dict(about.get("versions", {}))
    commit = versions.pop("commit", None)
    own = f"commlab {versions.pop('commlab', '?')}" + (f" ({commit})" if commit else "")
    machine = f"{hardware.get('cpu', '?')}, {hardware.get('cores', '?')} cores, {hardware.get('memory_GiB', '?')} GiB"
    known = {"python": "Python ", "torch": "torch "}
    others = [f"{known.get(name, '')}{value}" for name, value in versions.items() if value]
    load = f"load {about['load']} at the start" if "load" in about else ""
    when = about.get("date", "?")[:16].replace("T", " ") + " UTC"
    return "; ".join(
        text for text in (when, machine, hardware.get("system", ""), ", ".join([own, *others]), load) if text
    )


def svg(plot: Plot) -> str:
    """The picture as SVG, without a date and with names that do not change: equal records give equal bytes."""
    stream = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        plot.figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def write_png(plot: Plot, folder: Path) -> Path:
    """The picture with its title above, and below how to read it and where it comes from."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{plot.name}.png"
    width = 150
    below = [*textwrap.wrap(plot.reading, width)]
    for about in plot.sources:
        below += ["", *textwrap.wrap(origin(about), width), *textwrap.wrap(f"$ {about['command']}", width)]
    text = "\n".join(below).replace("$", r"\$")
    with matplotlib.rc_context(SETTINGS):
        title = plot.figure.suptitle(plot.title, x=0.01, ha="left", fontsize=12)
        note = plot.figure.text(0.01, -0.02, text, va="top", ha="left", fontsize=7.5, color="#555555")
        note.set_in_layout(False)
        # Legends too: they are placed by the box's edges, and would else lie on the axes.
        shown = [title, note, *plot.figure.legends]
        plot.figure.savefig(path, dpi=150, bbox_inches="tight", bbox_extra_artists=shown)
        title.remove()
        note.remove()
    return path


def page(plots: Sequence[Plot], tables: Sequence[Table]) -> str:
    """The whole page."""
    shown: list[Plot | Table] = [*plots, *tables]
    sources = [about for each in shown for about in each.sources]
    dates = sorted({about.get("date", "?")[:10] for about in sources})
    machines = sorted(
        {f"{about['hardware']['cpu']}, {about['hardware']['cores']} cores" for about in sources if "hardware" in about}
    )
    span = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else ""
    titles = [each.title for each in shown]
    contents = "".join(f'<li><a href="#s{at}">{_text(title)}</a></li>' for at, title in enumerate(titles))
    sections = [_section(at, plot.title, _figure(plot)) for at, plot in enumerate(plots)]
    sections += [_section(len(plots) + at, table.title, _table(table)) for at, table in enumerate(tables)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>commlab: what was measured</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>commlab: what was measured</h1>\n<p class=from>{_text(span)}; {_text('; '.join(machines))}</p>\n"
        f"<nav><ul>{contents}</ul></nav>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _section(at: int, title: str, body: str) -> str:
    return f'<section id="s{at}"><h2>{_text(title)}</h2>\n{body}\n</section>'


def _figure(plot: Plot) -> str:
    coded = base64.b64encode(svg(plot).encode()).decode()
    return (
        f'<figure><img alt="{_text(plot.title)}" src="data:image/svg+xml;base64,{coded}">'
        f"<figcaption>{_text(plot.reading)}</figcaption></figure>\n{_origins(plot.sources)}"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    shown = f"<div class=scroll><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    return f"{shown}\n{_origins(table.sources)}"


def _origins(sources: Sequence[Record]) -> str:
    return "\n".join(
        f"<p class=from>{_text(origin(about))}<br><code>{_text(about.get('command', '?'))}</code></p>"
        for about in sources
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)
