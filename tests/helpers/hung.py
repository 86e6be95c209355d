"""What a launch that hung tells last: for each rank the test, and where each of its threads stood."""

from __future__ import annotations

import re
from pathlib import Path

STACKS = "COMMLAB_TEST_STACKS"
"""The variable with the folder in which each rank has a file: the test that it is in, and after a while its stacks."""
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)')
_OURS = re.compile(r".*/(?=(?:commlab|tests|bench)/)")
_FRAMES = 4


def places(stacks: str) -> list[str]:
    """A line for each thread of what ``faulthandler`` has written: its innermost frames in the project, the innermost
    first, and the outermost, which is the test's."""
    threads: list[list[str]] = []
    for line in stacks.splitlines():
        if "most recent call first" in line:
            threads.append([])
        elif threads and (frame := _FRAME.fullmatch(line)):
            file = frame["file"]
            if (ours := _OURS.match(file)) and "/site-packages/" not in file:
                threads[-1].append(f"{file[ours.end() :]}:{frame['line']} {frame['function']}")
    asleep = "commlab/job/watch.py"
    return [
        " < ".join(thread[:_FRAMES] + thread[max(_FRAMES, len(thread) - 1) :])
        for thread in threads
        if thread and not thread[0].startswith(asleep)
    ]


def digest(folder: Path) -> str:
    """Where the ranks stand that have shown their stacks, once for all that stand at the same place, and the test that
    each is in; few lines, because of a long output the end is what is read. Empty where nothing hung."""
    ranks: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir(), key=lambda file: int(file.name)):
        test, _, stacks = file.read_text(errors="replace").partition("\n")
        if stacks:
            where = "\n".join([test, *(f"    {place}" for place in places(stacks))])
            ranks.setdefault(where, []).append(file.name)
    return "\n".join(f"rank {', '.join(names)} in {where}" for where, names in ranks.items())
