"""``python -m bench.timeline TRACE.json --step N --png FILE``: one step of a trainer's trace as a picture.

A group of rows per rank: what it computes (and where it stands still), the gradients and the parameters that travel
meanwhile, what a server does. Perfetto opens the same file and shows all of it, with every span's name.

    python -m commlab.train ... --trace trace.json
    python -m bench.timeline trace.json --step 4 --png step.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STEPS = "steps"
"""The lane that says from when to when a step was."""
WAITING = "waiting"


class Span(NamedTuple):
    """Something that ``rank`` did, in milliseconds."""

    rank: int
    lane: str
    name: str
    start_ms: float
    stop_ms: float
    args: dict[str, Any]


class Bar(NamedTuple):
    """A span as it is drawn. ``place``: which of the row's lines it is on, from above."""

    start_ms: float
    stop_ms: float
    kind: str
    label: str
    place: int


class Row(NamedTuple):
    """What a rank did on one lane. ``lines``: how many lines its bars take, because they overlap in time."""

    rank: int
    title: str
    bars: list[Bar]
    lines: int


def read(path: str | Path) -> tuple[dict[str, Any], list[Span]]:
    """What the trace says about itself, and its spans. ValueError for another kind of file."""
    try:
        written = json.loads(Path(path).read_text())
        events = written["traceEvents"]
        lanes = {(each["pid"], each["tid"]): each["args"]["name"] for each in events if each["name"] == "thread_name"}
        spans = [
            Span(
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


def cut(spans: Sequence[Span], step: int, ranks: Iterable[int] | None = None) -> list[Span]:
    """The spans of ``ranks`` (None: all) while any of them was in ``step``, on a clock that starts with it; what
    reaches beyond is cut off. ValueError where the trace does not have them."""
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


def kind_of(span: Span) -> str:
    """How a span is coloured; empty for one that only holds others."""
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


def label_of(span: Span) -> str:
    """The shortest text that says which bucket or parameters it is; empty where nobody needs it."""
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


def rows(spans: Sequence[Span]) -> list[Row]:
    """Rank by rank: computing, gradients, parameters, serving; without rows that are empty."""
    found = []
    for rank in sorted({span.rank for span in spans}):
        own = [span for span in spans if span.rank == rank and kind_of(span)]
        travelling = [span for span in own if span.lane == "exchange"]
        parameters = [span for span in travelling if kind_of(span) == "parameters"]
        for title, part in (
            ("computes", [span for span in own if span.lane == "compute"]),
            ("gradients", [span for span in travelling if kind_of(span) != "parameters"]),
            ("parameters", parameters),
            ("serves", [span for span in own if span.lane == "server"]),
        ):
            if part:
                found.append(_row(rank, title, part))
    return found


def _row(rank: int, title: str, spans: Sequence[Span]) -> Row:
    """Spans that overlap go below each other, but for what is computed, where one holds the other; and one that holds
    another of its name is enough."""
    free_ms: list[float] = []
    bars: list[Bar] = []
    until_ms: dict[str, float] = {}
    order = 1 if title in ("gradients", "parameters") else -1  # of two that begin together the outer one comes first
    for span in sorted(spans, key=lambda span: (span.start_ms, order * span.stop_ms)):
        if title == "computes" and span.stop_ms <= until_ms.get(span.name, -1.0):
            continue
        until_ms[span.name] = span.stop_ms
        place = 0
        if title in ("gradients", "parameters"):
            place = next((at for at, until in enumerate(free_ms) if until <= span.start_ms), len(free_ms))
            free_ms[place : place + 1] = [span.stop_ms]
        bars.append(Bar(span.start_ms, span.stop_ms, kind_of(span), label_of(span), place))
    return Row(rank, title, bars, max(1, len(free_ms)))


def waited_ms(row: Row) -> float:
    """For how long the rank stood still, waiting for others."""
    total, until_ms = 0.0, 0.0
    for bar in row.bars:
        if bar.kind == WAITING and bar.stop_ms > until_ms:
            total += bar.stop_ms - max(bar.start_ms, until_ms)
            until_ms = bar.stop_ms
    return total


def title_of(about: dict[str, Any], step: int, where: str) -> str:
    config = about.get("config", {})
    servers = f" with {config['servers']} server{'s' * (config['servers'] > 1)}" if config.get("servers") else ""
    wire = f", wire {config['wire']}" if config.get("wire") else ""
    off = ", without overlap" if config.get("overlap") == "off" else ""
    ranks = about.get("ranks", 0)
    ranks_text = f"{ranks} rank{'s' * (ranks != 1)}" if ranks else ""
    what = f"{config.get('strategy', '?')}{servers}{wire}{off}"
    return ", ".join(
        text for text in (f"One step ({step}) of {what}", config.get("model", ""), ranks_text, where) if text
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.timeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", metavar="TRACE.json")
    parser.add_argument("--step", type=int, required=True, help="as the trainer counts them, from 0")
    parser.add_argument("--ranks", metavar="LIST", help="as 0,1 (default: all)")
    parser.add_argument("--where", default="", metavar="TEXT", help='for the title: "2 hosts at 200 Mbit/s"')
    parser.add_argument("--launcher", default="", metavar="TEXT", help="for the caption: what stood before the command")
    parser.add_argument("--png", metavar="FILE")
    parser.add_argument("--svg", metavar="FILE")
    options = parser.parse_args(argv)
    try:
        ranks = None if options.ranks is None else [int(text) for text in options.ranks.split(",")]
        about, spans = read(options.trace)
        found = rows(cut(spans, options.step, ranks))
        for row in found:
            if row.title == "computes":
                length_ms = max(bar.stop_ms for bar in row.bars)
                print(f"rank {row.rank}: waits {waited_ms(row):.1f} ms of {length_ms:.1f}")
        files = [name for name in (options.png, options.svg) if name]
        if files:
            from .pictures.timeline import draw

            command = " ".join(filter(None, (options.launcher, about.get("command", ""))))
            draw(found, title_of(about, options.step, options.where), command, files)
    except (OSError, ValueError) as error:
        print(f"bench.timeline: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"bench.timeline: pictures need matplotlib: pip install matplotlib ({error})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
