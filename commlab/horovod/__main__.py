"""``python -m commlab.horovod SCRIPT [ARGUMENTS]``: run a program that imports horovod on commlab."""

from __future__ import annotations

import os
import runpy
import sys

from . import replace


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(
            "usage: mpirun -n P python -m commlab.horovod SCRIPT [ARGUMENTS]\n"
            "       mpirun -n P python -m commlab.horovod -m MODULE [ARGUMENTS]\n\n"
            "Runs the program; `import horovod.torch` in it means commlab. torchrun launches it too."
        )
        sys.exit(0 if len(sys.argv) > 1 else 2)
    replace()
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
