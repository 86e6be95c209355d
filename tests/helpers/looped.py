"""``python tests/helpers/looped.py SECONDS [RANKS]``: what would hang if a collective kept the interpreter's lock while
another thread needs it, again and again for so long.

By turns the programs of ``tests/c10d/test_traps.py`` whose threads use groups, and torch's own tests of coalesced
operations (under gloo's name; they want ``expecttest``). One that takes longer than a minute counts as a hang.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import unittest
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import Forked
from torch_suite import load, prepare

HANG_S = 60
"""The longest of them takes some seconds, on a busy machine too."""
TRAPS = Path(__file__).parents[1] / "c10d" / "test_traps.py"
THREADED = ("fallbacks_beside_python", "two_threads", "works_outlive_groups")
OF_TWO = ("futures", "builtin_hooks")


def threaded(ranks: int) -> dict[str, Callable[..., Any]]:
    """The programs, by name; some are for two ranks only."""
    spec = importlib.util.spec_from_file_location("looped_traps", TRAPS)
    assert spec is not None and spec.loader is not None
    traps = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(traps)
    return {name: getattr(traps, name) for name in (*THREADED, *(OF_TWO if ranks == 2 else ()))}


def main(seconds: float, ranks: int) -> int:
    """Prints how often each ran. Returns the exit code."""
    programs = threaded(ranks)
    jobs = Forked()
    prepare("gloo", str(ranks), HANG_S)
    case = load("gloo")
    names = [name for name in unittest.TestLoader().getTestCaseNames(case) if "coalesced" in name]
    assert names, "this torch has no tests of coalesced operations"
    started_s, turn, ran, wrong = time.monotonic(), 0, Counter[str](), list[str]()
    while time.monotonic() < started_s + seconds:
        name = list(programs)[turn % len(programs)]
        try:
            jobs(programs[name], ranks, limit_s=HANG_S)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
        result = unittest.TestResult()
        case(names[turn % len(names)]).run(result)
        wrong += [f"{test}: {text}" for test, text in result.failures + result.errors]
        ran[name] += 1
        ran["torch's tests of coalesced operations"] += not result.skipped
        turn += 1
    jobs.close()
    for name, count in ran.items():
        print(f"{count:5} x {name}")
    print(f"{ranks} ranks, {time.monotonic() - started_s:.0f} s: {len(wrong)} hung or failed")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        print(__doc__)
        sys.exit(2)
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 2))
