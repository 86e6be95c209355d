"""How this process was launched, and how the whole job ends when one rank fails.

Under plain ``mpirun python`` an exception in one rank leaves the other ranks waiting for ever: the interpreter exits,
and MPI_Finalize, which runs at exit, waits for all ranks. So the hook that is installed here prints the traceback once
and then ends the job.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from ..errors import UsageError
from .leaving import interactive

LONGEST_S = 1e9
"""The longest time-out, 30 years: clocks of the system, of MPI and of torch overflow not far above."""

_LAUNCHERS = (
    (
        "openmpi",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("mpich", "PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("torchrun", "RANK", ("WORLD_SIZE",), "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("slurm", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)
"""Launchers, each with its variables for rank, size, local rank and local size. The first launcher whose variables are
set is believed: one that starts another (Slurm starts mpirun) leaves its own variables set, and the inner one, which
comes first here, knows best. torchrun is the innermost where it says that it is there, with TORCHELASTIC_RUN_ID:
without it, RANK and WORLD_SIZE may have been set by anybody."""

RANK_VARIABLES = {launcher: rank for launcher, rank, *_ in _LAUNCHERS}
"""By launcher: the variable that every rank has, and the launcher itself has not."""

_SLURM_NO_STEP = ("", "4294967290", "4294967291")
"""Where a process of an allocation is none of a parallel step: a batch script, an interactive shell (the numbers are
SLURM_INTERACTIVE_STEP and SLURM_BATCH_SCRIPT)."""


@dataclass(frozen=True)
class Launch:
    """Which rank this process is, by the launcher's variables. ``launcher`` is None for a process that no launcher
    started: rank 0 of 1."""

    launcher: str | None
    rank: int
    size: int
    local_rank: int
    local_size: int


_ALONE = Launch(None, 0, 1, 0, 1)


def detect(environ: Mapping[str, str] | None = None) -> Launch:
    """Read the launcher's variables (``environ``; default: this process's). This needs no MPI and costs nothing, so
    errors can name the rank before MPI is up. Variables that are empty count as not set; UsageError for those that are
    no rank of a job."""
    environ = os.environ if environ is None else environ
    launchers = sorted(_LAUNCHERS, key=lambda entry: entry[0] != "torchrun" or not environ.get("TORCHELASTIC_RUN_ID"))
    for launcher, rank_name, size_names, local_rank_name, local_size_name in launchers:
        size_name = next((name for name in size_names if environ.get(name)), size_names[-1])
        if not (environ.get(rank_name) and environ.get(size_name)):
            continue
        rank, size = _number(environ, rank_name), _number(environ, size_name)
        if launcher == "slurm" and rank == 0 and environ.get("SLURM_STEP_ID", "") in _SLURM_NO_STEP:
            continue
        if launcher == "torchrun" and size == 1 and not environ.get("TORCHELASTIC_RUN_ID"):
            continue
        if not 0 <= rank < size:
            raise UsageError(
                f"{rank_name}={rank} and {size_name}={size} are set, and ranks go from 0 to {max(0, size - 1)}; unset "
                "them, or launch with torchrun or mpirun, which set them"
            )
        local_rank, local_size = environ.get(local_rank_name, ""), environ.get(local_size_name, "")
        return Launch(
            launcher,
            rank,
            size,
            int(local_rank) if local_rank.isdecimal() else rank,
            int(local_size) if local_size.isdecimal() and int(local_size) else size,
        )
    return _ALONE


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks, for messages: (0, 1) where the launcher's variables make no
    sense."""
    try:
        launch = detect()
    except UsageError:
        launch = _ALONE
    return launch.rank, launch.size


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name].strip()
    if not (text.isascii() and text.removeprefix("-").isdecimal()):
        raise UsageError(f"{name}={environ[name]!r} is set, which is no number; unset it, or set a number")
    return int(text)


_abort: Callable[[int], None] | None = None
"""Ends all ranks with an exit code; None until :func:`install_exception_hook` was called."""


def end_job(code: int = 1) -> None:
    """End every rank of the job at once with exit code ``code``; returns only when this process is the whole job."""
    try:
        # torch's DataLoader raises an exception wherever the main thread is when one of its workers dies.
        with suppress(ValueError, AttributeError):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for stream in (sys.stdout, sys.stderr):
            # A reader that has gone away must not keep this rank, and with it the job, alive.
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        if _abort is not None:
            time.sleep(0.1)  # MPICH's launcher drops what was written in the moment before
    finally:
        if _abort is not None:
            _abort(code)


def report(error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an unhandled exception of this rank, once, every line with the rank."""
    rank, size = rank_and_size()
    head = f"[rank {rank} of {size}] " if size > 1 else ""
    text = "".join(traceback.format_exception(type(error), error, trace))
    # One write: the lines of several ranks must not be mixed.
    sys.stderr.write("".join(f"{head}{line}\n" for line in text.rstrip().splitlines()))
    sys.stderr.flush()


def install_exception_hook(abort: Callable[[int], None]) -> None:
    """From now on an unhandled exception in this rank, in any thread, ends the whole job through ``abort(code)``.

    The hooks that were there before are called too: after the traceback is printed, and before the job ends. In an
    interactive session they are all that is called, because the session goes on.
    """
    global _abort
    _abort = abort
    if getattr(sys.excepthook, "of_commlab", False):
        return
    before, before_in_threads = sys.excepthook, threading.excepthook

    def on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if _abort is None or interactive():
            before(kind, error, trace)
            return
        code = 130 if issubclass(kind, KeyboardInterrupt) else 1
        try:
            if code == 1:
                report(error, trace)
            if before is not sys.__excepthook__:
                before(kind, error, trace)
        finally:
            end_job(code)

    def on_thread_exception(details: threading.ExceptHookArgs) -> None:
        if details.exc_value is None or isinstance(details.exc_value, SystemExit):
            return
        if _abort is None or interactive():
            before_in_threads(details)
            return
        try:
            report(details.exc_value, details.exc_traceback)
            if before_in_threads is not threading.__excepthook__:
                before_in_threads(details)
        finally:
            end_job(1)

    on_exception.of_commlab = True  # type: ignore[attr-defined]
    sys.excepthook = on_exception
    threading.excepthook = on_thread_exception
