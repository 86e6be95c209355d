"""One step out of a trainer's trace, as tracks of bars that a picture shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STEPS = "steps"
"""The lane whose spans are the whole steps."""
WAITING = "waiting"
"""The kind of a span in which a rank stands still."""


class TraceSpan(NamedTuple):
    """A piece of work of ``rank``, from and to when in milliseconds."""

    rank: int
    lane: str
    name: str
    start_ms: float
    stop_ms: float
    args: dict[str, Any]


class Bar(NamedTuple):
    """A span as it is drawn. ``line``: the line of the track that the bar is on, from above."""

    start_ms: float
    stop_ms: float
    kind: str
    label: str
    line: int


class Track(NamedTuple):
    """The bars of one kind of work of a rank. ``lines``: how many lines the bars take, because they overlap in time."""

    rank: int
    title: str
    bars: list[Bar]
    lines: int


def read(path: str | Path) -> tuple[dict[str, Any], list[TraceSpan]]:
    """What a trace tells about its job, and its spans. ValueError for another kind of file."""
    try:
        written = json.loads(Path(path).read_text())
        events = written["traceEvents"]
        lanes = {(each["pid"], each["tid"]): each["args"]["name"] for each in events if each["name"] == "thread_name"}
        spans = [
            TraceSpan(
                each["pid"],
                lanes[each["pid"], each["tid"]],
                each["name"],
                each["ts"] / 1e3,
                (each["ts"] + each["dur"]) / 1e3,
                each.get("args", {}),
            )
            for each in events
            if each["ph"] == "X"
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a trace that commlab.train --trace wrote ({error!r})") from error
    return written.get("otherData", {}), spans


def cut(spans: Sequence[TraceSpan], step: int, ranks: Iterable[int] | None = None) -> list[TraceSpan]:
    """The spans of ``ranks`` (None: all) while any of these ranks was in ``step``, on a clock that starts with the
    step; spans that reach beyond the step are cut off. ValueError where the trace has no such step or rank."""
    known = sorted({span.rank for span in spans})
    chosen = known if ranks is None else list(ranks)
    if missing := [rank for rank in chosen if rank not in known]:
        raise ValueError(f"no rank {missing[0]} in this trace; there are {', '.join(map(str, known))}")
    ended = {span.args["step"] for span in spans if span.lane == STEPS}
    inside = [span for span in spans if span.lane == STEPS and span.args["step"] == step and span.rank in chosen]
    if not inside:
        found = f"steps {min(ended)} to {max(ended)}" if ended else "no steps at all"
        raise ValueError(f"no step {step} of these ranks in this trace, which has {found}")
    start_ms, stop_ms = min(span.start_ms for span in inside), max(span.stop_ms for span in inside)
    return [
        span._replace(start_ms=max(0.0, span.start_ms - start_ms), stop_ms=min(stop_ms, span.stop_ms) - start_ms)
        for span in spans
        if span.rank in chosen and span.start_ms < stop_ms and span.stop_ms > start_ms
    ]


def kind_of(span: TraceSpan) -> str:
    """The kind of a span, by which it is coloured; empty for a span that only holds others."""
    name = span.name
    if span.lane == STEPS or (span.lane == "compute" and name == "step"):
        return ""
    if span.lane == "compute":
        if name in ("exchange", "pull") or name.startswith("wait for"):
            return WAITING
        return name if name in ("forward", "backward", "update") else "pack" if name.startswith("pack") else "other"
    if name.startswith(("pull", "allgather", "broadcast")):
        return "parameters"
    if name.startswith("push") or "'bucket " in name:
        return "gradients"
    return "words"


def label_of(span: TraceSpan) -> str:
    """The shortest text that names the bucket or the parameters of a span; empty where nobody needs a label."""
    kind, quoted = kind_of(span), span.name.split("'")[1::2]
    if kind in ("forward", "backward", "update"):
        return kind
    if kind not in ("gradients", "parameters"):
        return ""
    if not quoted:  # a server's: "push h.0.ln_1.weight of peer 0, clock 4"
        return ""
    first = quoted[0].removeprefix("parameters of ").removeprefix("transformer.").removesuffix(".weight")
    number = first.removeprefix("bucket ")
    return f"b{number}" if number != first else f"{first} .." if len(quoted) > 1 else first


def tracks(spans: Sequence[TraceSpan]) -> list[Track]:
    """The tracks rank by rank: computing, gradients, parameters, serving; without empty tracks."""
    found = []
    for rank in sorted({span.rank for span in spans}):
        own = [span for span in spans if span.rank == rank and kind_of(span)]
        travelling = [span for span in own if span.lane == "exchange"]
        parameters = [span for span in travelling if kind_of(span) == "parameters"]
        for title, shown in (
            ("computes", [span for span in own if span.lane == "compute"]),
            ("gradients", [span for span in travelling if kind_of(span) != "parameters"]),
            ("parameters", parameters),
            ("serves", [span for span in own if span.lane == "server"]),
        ):
            if shown:
                found.append(_track(rank, title, shown))
    return found


def _track(rank: int, title: str, spans: Sequence[TraceSpan]) -> Track:
    """Spans that overlap go below each other. Of computing, where one span holds the other, all go on one line; and of
    a span that holds another of its name only the outer one is shown."""
    free_ms: list[float] = []
    bars: list[Bar] = []
    until_ms: dict[str, float] = {}
    order = 1 if title in ("gradients", "parameters") else -1  # of two that begin together the outer one comes first
    for span in sorted(spans, key=lambda span: (span.start_ms, order * span.stop_ms)):
        if title == "computes" and span.stop_ms <= until_ms.get(span.name, -1.0):
            continue
        until_ms[span.name] = span.stop_ms
        line = 0
        if title in ("gradients", "parameters"):
            line = next((at for at, until in enumerate(free_ms) if until <= span.start_ms), len(free_ms))
            free_ms[line : line + 1] = [span.stop_ms]
        bars.append(Bar(span.start_ms, span.stop_ms, kind_of(span), label_of(span), line))
    return Track(rank, title, bars, max(1, len(free_ms)))


def waited_ms(track: Track) -> float:
    """How long the rank of a track stood still, waiting for others."""
    total, until_ms = 0.0, 0.0
    for bar in track.bars:
        if bar.kind == WAITING and bar.stop_ms > until_ms:
            total += bar.stop_ms - max(bar.start_ms, until_ms)
            until_ms = bar.stop_ms
    return total


def title_of(about: dict[str, Any], step: int, where: str) -> str:
    """The title of a step's picture. ``where``: the machines, in the user's words."""
    config = about.get("config", {})
    servers = f" with {config['servers']} server{'s' * (config['servers'] > 1)}" if config.get("servers") else ""
    wire = f", wire {config['wire']}" if config.get("wire") else ""
    off = ", without overlap" if config.get("overlap") == "off" else ""
    ranks = about.get("ranks", 0)
    ranks_text = f"{ranks} rank{'s' * (ranks != 1)}" if ranks else ""
    strategy = f"{config.get('strategy', '?')}{servers}{wire}{off}"
    return ", ".join(
        text for text in (f"One step ({step}) of {strategy}", config.get("model", ""), ranks_text, where) if text
    )
