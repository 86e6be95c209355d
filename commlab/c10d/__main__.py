"""``python -m commlab.c10d SCRIPT [ARGUMENTS]``: run a program that says "gloo" on commlab."""

from __future__ import annotations

from ..job.program import run_program
from . import replace_gloo

USAGE = """\
usage: python -m commlab.c10d SCRIPT [ARGUMENTS]
       python -m commlab.c10d -m MODULE [ARGUMENTS]

Runs the program; torch.distributed's groups of backend "gloo" are commlab's."""

if __name__ == "__main__":
    run_program(USAGE, replace_gloo)
