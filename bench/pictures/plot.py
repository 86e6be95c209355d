"""What all pictures of result files have in common: the records of a picture, its colours and its axes.

A plot is drawn on a Figure of its own, without pyplot and its global state. Equal records give equal pictures, byte for
byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..core.results import Record, Run

Key = TypeVar("Key")

SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "commlab",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
}
"""The settings of matplotlib while plots are made and written: a font of its own, and names in SVG that do not
change."""

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
"""The colours by algorithm, or by the beginning of a peer's name: a contestant has one colour in all plots."""


class Plot(NamedTuple):
    """A picture, and the words that go with it."""

    name: str
    """The name of the picture's file, without a suffix."""
    title: str
    reading: str
    """How to read the picture."""
    figure: Figure
    sources: Sequence[Record]
    """The ``run`` lines whose records are drawn, in their order."""


class Drawn(NamedTuple):
    """A record that is drawn, with the ``run`` line above it."""

    about: Record
    record: Record


def grouped(runs: Iterable[Run], key: Callable[[Record, Record], Key | None]) -> dict[Key, list[Drawn]]:
    """Records by ``key(run line, record)``, in the order of the files; records whose key is None are left out."""
    found: dict[Key, list[Drawn]] = {}
    for about, records in runs:
        for record in records:
            at = key(about, record)
            if at is not None:
                found.setdefault(at, []).append(Drawn(about, record))
    return found


def sources_of(drawn: Iterable[Drawn]) -> list[Record]:
    """Every ``run`` line once, in order."""
    return list({id(each.about): each.about for each in drawn}.values())


def file_name(*words: Any) -> str:
    """A name that every file system takes."""
    text = "-".join(str(word) for word in words if word not in (None, ""))
    return "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in text).lower()


def panel(figure: Figure, title: str = "") -> Axes:
    """New axes that fill the figure."""
    axes = figure.add_subplot()
    dress(axes, title)
    return axes


def dress(axes: Axes, title: str = "") -> None:
    """Give axes the look of all plots."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)


def legend_beside(figure: Figure, axes: Axes) -> None:
    """Put the legend right of the panels, where the legend covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)


def colour(record: Record) -> str:
    """The colour of a contestant in all plots."""
    if record.get("algorithm") in _COLOURS:
        return _COLOURS[record["algorithm"]]
    name: str = record.get("contestant", "")
    return next((shade for prefix, shade in _COLOURS.items() if name.startswith(prefix)), "#444444")
