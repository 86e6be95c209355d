"""The picture of one step: tracks of bars on a common clock, a colour for each kind of work."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .plot import SETTINGS, WIDTH_IN
from .steps import WAITING, Bar, Track, waited_ms

_KINDS = {
    "forward": ("#b9c4cf", "forward"),
    "backward": ("#7e8b98", "backward"),
    "update": ("#e0a21e", "optimizer"),
    "pack": ("#33404d", "packing a bucket"),
    WAITING: ("#d9534a", "computes nothing: waits for others"),
    "gradients": ("#5a9bd8", "gradients travel (b0: bucket 0)"),
    "parameters": ("#4faf6d", "parameters travel"),
    "words": ("#a0399b", "norm, loss, clock: a few bytes"),
    "other": ("#dddddd", "other"),
}
"""The colour of each kind of bar, and its text in the legend."""
_ALTERNATE = {"gradients": "#2f6fae", "parameters": "#2b7d47"}
"""The colours of every second bar of these kinds, so that neighbours can be told apart."""
_LINE_IN, _LEAST_IN, _GAP_IN = 0.115, 0.34, 0.08
_RANK_GAP_IN = 0.22
_LEFT, _WIDTH = 0.115, 0.87
"""Where the tracks begin, and how long they are, as shares of the figure's width."""


def draw(tracks: Sequence[Track], title: str, command: str, files: Sequence[str]) -> None:
    """Write the picture to ``files``, by their suffix: .png or .svg."""
    with matplotlib.rc_context({**SETTINGS, "svg.fonttype": "none"}):
        figure = _figure(tracks, title, textwrap.wrap(command, 165))
        for name in files:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(name, dpi=140, metadata={"Date": None} if name.endswith(".svg") else None)


def _figure(tracks: Sequence[Track], title: str, below: Sequence[str]) -> Figure:
    length_ms = max(bar.stop_ms for track in tracks for bar in track.bars)
    heights = [max(_LEAST_IN, _LINE_IN * track.lines) for track in tracks]
    gaps = [_GAP_IN if at and track.rank == tracks[at - 1].rank else _RANK_GAP_IN for at, track in enumerate(tracks)]
    # In inches: the words above and below the tracks take as much room whatever the number of tracks.
    body, top, bottom = sum(heights) + sum(gaps) + _GAP_IN, 0.3, 0.95 + 0.14 * len(below)
    height = body + top + bottom
    figure = Figure(figsize=(WIDTH_IN, height))
    axes = figure.add_axes((_LEFT, bottom / height, _WIDTH, body / height))
    axes.set_xlim(0, length_ms)
    axes.set_ylim(body, 0)
    at, middles = 0.0, []
    for track, height_in, gap_in in zip(tracks, heights, gaps, strict=True):
        at += gap_in
        _draw_track(axes, track, at, height_in, length_ms)
        middles.append(at + height_in / 2)
        at += height_in
    axes.set_yticks(middles, [f"rank {track.rank} {track.title}" for track in tracks], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(True, axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)
    axes.set_xlabel("milliseconds since the step began", fontsize=8)
    used = {bar.kind for track in tracks for bar in track.bars}
    figure.legend(
        handles=[Patch(color=colour, label=text) for kind, (colour, text) in _KINDS.items() if kind in used],
        loc="lower left",
        bbox_to_anchor=(0.01, (0.06 + 0.14 * len(below)) / height),
        ncols=4,
        fontsize=7.5,
        frameon=False,
    )
    figure.text(0.01, 1 - 0.1 / height, title, fontsize=10.5, va="top", ha="left")
    text = "\n".join(below).replace("$", r"\$")
    figure.text(0.01, 0.05 / height, text, fontsize=7, va="bottom", ha="left", color="#555555")
    return figure


def _draw_track(axes: Axes, track: Track, top: float, height: float, length_ms: float) -> None:
    line_height = height / track.lines
    shown = sorted(track.bars, key=lambda bar: (bar.line, bar.start_ms))
    colours = {
        bar: _ALTERNATE[bar.kind] if at % 2 and bar.kind in _ALTERNATE else _KINDS[bar.kind][0]
        for at, bar in enumerate(shown)
    }
    for bar in sorted(
        shown, key=lambda bar: bar.start_ms - bar.stop_ms
    ):  # an inner bar comes after the outer one, on top
        middle = top + (bar.line + 0.5) * line_height
        length = bar.stop_ms - bar.start_ms
        axes.barh(middle, length, 0.86 * line_height, left=bar.start_ms, color=colours[bar], linewidth=0)
    for bar, following in zip_longest(shown, shown[1:]):
        beside = following is not None and following.line == bar.line
        room_ms = (following.start_ms if beside else length_ms) - bar.stop_ms
        _label(axes, bar, top + (bar.line + 0.5) * line_height, track.lines, length_ms, room_ms)
    if track.title == "computes" and (waited := waited_ms(track)):
        text = f"waits {waited:.0f} ms of {length_ms:.0f}"
        axes.annotate(text, (length_ms, top), (0, 1), textcoords="offset points", ha="right", va="bottom", fontsize=7)


def _label(axes: Axes, bar: Bar, middle: float, lines: int, length_ms: float, room_ms: float) -> None:
    """Write the bar's label inside the bar where it fits, else to the right of the bar, where there is ``room_ms``;
    else nowhere."""
    size = 7.5 if lines == 1 else 5.5
    needed_ms = 0.62 * size * len(bar.label) / (_WIDTH * WIDTH_IN * 72) * length_ms
    if not bar.label or (bar.kind in ("forward", "backward") and needed_ms > bar.stop_ms - bar.start_ms):
        return
    if needed_ms < bar.stop_ms - bar.start_ms:
        at, colour, align = (bar.start_ms + bar.stop_ms) / 2, "#111111" if bar.kind == "forward" else "white", "center"
    elif lines > 1 and needed_ms < room_ms:
        at, colour, align = bar.stop_ms + 0.003 * length_ms, "#222222", "left"
    else:
        return
    axes.text(at, middle, bar.label, fontsize=size, color=colour, ha=align, va="center_baseline", clip_on=True)
