"""``python -m bench.timeline TRACE.json --step N --png FILE``: one step of a trainer's trace as a picture.

A group of rows per rank: what it computes (and where it stands still), the gradients and the parameters that travel
meanwhile, what a server does. Perfetto opens the same file and shows all of it, with every span's name.

    python -m commlab.train ... --trace trace.json
    python -m bench.timeline trace.json --step 4 --png step.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .core import program
from .pictures import needs_matplotlib
from .pictures.steps import cut, read, title_of, tracks, waited_ms

NAME = "bench.timeline"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE.json")
    parser.add_argument("--step", type=int, required=True, help="as the trainer counts them, from 0")
    parser.add_argument("--ranks", metavar="LIST", help="as 0,1 (default: all)")
    parser.add_argument("--where", default="", metavar="TEXT", help='for the title: "2 hosts at 200 Mbit/s"')
    parser.add_argument("--launcher", default="", metavar="TEXT", help="for the caption: what stood before the command")
    parser.add_argument("--png", metavar="FILE")
    parser.add_argument("--svg", metavar="FILE")


def main(argv: Sequence[str] | None = None) -> int:
    options = program.parser(NAME, __doc__, arguments).parse_args(argv)
    try:
        ranks = None if options.ranks is None else [int(text) for text in options.ranks.split(",")]
        about, spans = read(options.trace)
        found = tracks(cut(spans, options.step, ranks))
        for track in found:
            if track.title == "computes":
                length_ms = max(bar.stop_ms for bar in track.bars)
                print(f"rank {track.rank}: waits {waited_ms(track):.1f} ms of {length_ms:.1f}")
        files = [name for name in (options.png, options.svg) if name]
        if files:
            from .pictures.timeline import draw

            command = " ".join(filter(None, (options.launcher, about.get("command", ""))))
            draw(found, title_of(about, options.step, options.where), command, files)
    except (OSError, ValueError) as error:
        return program.refuse(NAME, error)
    except ImportError as error:
        return program.refuse(NAME, needs_matplotlib(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
