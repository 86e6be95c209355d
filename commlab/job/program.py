"""A program in another's place: what ``python -m commlab.c10d`` and ``python -m commlab.horovod`` run."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable


def run_program(usage: str, prepare: Callable[[], object]) -> None:
    """Call ``prepare()`` and become the program of this process's arguments, ``SCRIPT [ARGUMENTS]`` or ``-m MODULE
    [ARGUMENTS]``, as ``python`` would run it. Without a program ``usage`` is printed, and the process ends."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(usage)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    prepare()
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
