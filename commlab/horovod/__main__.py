"""``python -m commlab.horovod SCRIPT [ARGUMENTS]``: run a program that imports horovod on commlab."""

from __future__ import annotations

from ..job.program import run_program
from . import replace

USAGE = """\
usage: mpirun -n P python -m commlab.horovod SCRIPT [ARGUMENTS]
       mpirun -n P python -m commlab.horovod -m MODULE [ARGUMENTS]

Runs the program; `import horovod.torch` in it means commlab. torchrun launches it too."""

if __name__ == "__main__":
    run_program(USAGE, replace)
