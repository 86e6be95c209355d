"""How this process was launched, and how the whole job ends when one rank fails.

Under plain ``mpirun python`` an exception in one rank leaves the other ranks waiting for ever: the interpreter exits,
and MPI_Finalize, which runs at exit, waits for all ranks. So the hook that is installed here prints the traceback once
and then ends the job.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    (
        "openmpi",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)
"""Launchers, each with its variables for rank, size, local rank and local size. The first launcher whose variables are
set is believed: one that starts another (Slurm starts mpirun) leaves its own variables set, and the inner one, which
comes first here, knows best."""


@dataclass(frozen=True)
class Launch:
    """Which rank this process is, by the launcher's variables. ``launcher`` is None for a process that no launcher
    started: rank 0 of 1."""

    launcher: str | None
    rank: int
    size: int
    local_rank: int
    local_size: int


def detect(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables. This needs no MPI and costs nothing, so errors can name the rank before MPI is
    up."""
    for launcher, rank, size, local_rank, local_size in _LAUNCHERS:
        if rank in environ and size in environ:
            ranks = int(environ[size])
            local = environ.get(local_size, "")
            return Launch(
                launcher,
                int(environ[rank]),
                ranks,
                int(environ.get(local_rank, environ[rank])),
                int(local) if local.isdigit() else ranks,
            )
    return Launch(None, 0, 1, 0, 1)


_abort: Callable[[int], None] | None = None
"""Ends all ranks with an exit code; None until :func:`install_exception_hook` was called."""


def end_job(code: int = 1) -> None:
    """End every rank of the job at once with exit code ``code``; returns only when this process is the whole job."""
    for stream in (sys.stdout, sys.stderr):
        # A reader that has gone away must not keep this rank, and with it the job, alive.
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if _abort is not None:
        time.sleep(0.1)  # MPICH's launcher drops what was written in the moment before
        _abort(code)


def report(error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an unhandled exception of this rank, once, every line with the rank."""
    launch = detect()
    head = f"[rank {launch.rank} of {launch.size}] " if launch.size > 1 else ""
    text = "".join(traceback.format_exception(type(error), error, trace))
    # One write: the lines of several ranks must not be mixed.
    sys.stderr.write("".join(f"{head}{line}\n" for line in text.rstrip().splitlines()))
    sys.stderr.flush()


def install_exception_hook(abort: Callable[[int], None]) -> None:
    """From now on an unhandled exception in this rank, in any thread, ends the whole job through ``abort(code)``."""
    global _abort
    first = _abort is None
    _abort = abort
    if not first:
        return

    def on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            end_job(130)
            return
        try:
            report(error, trace)
        finally:
            end_job(1)

    def on_thread_exception(details: threading.ExceptHookArgs) -> None:
        if details.exc_value is not None and not isinstance(details.exc_value, SystemExit):
            on_exception(details.exc_type, details.exc_value, details.exc_traceback)

    sys.excepthook = on_exception
    threading.excepthook = on_thread_exception
