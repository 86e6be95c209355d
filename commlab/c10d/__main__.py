"""``python -m commlab.c10d SCRIPT [ARGUMENTS]``: run a program that says "gloo" on commlab."""

from __future__ import annotations

import runpy
import sys

from . import replace_gloo


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(
            "usage: python -m commlab.c10d SCRIPT [ARGUMENTS]\n       python -m commlab.c10d -m MODULE [ARGUMENTS]\n\n"
            "Runs the program; torch.distributed's groups of backend \"gloo\" are commlab's."
        )
        sys.exit(0 if len(sys.argv) > 1 else 2)
    replace_gloo()
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = sys.argv[1:]
    sys.path[0] = ""
    import os

    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
