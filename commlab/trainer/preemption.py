"""A scheduler's warning: SIGUSR1 says that the time is nearly up, and the run saves a checkpoint and ends.

One rank that is warned is enough. The warning travels with the step's loss, which all ranks add up anyway, so it costs
no message, and all ranks save after the same step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, and starting the same command again goes on."""


@dataclass
class Preemption:
    """What this rank has been told about the job's end."""

    warned: bool = False
    """Whether SIGUSR1 has come."""


@contextmanager
def listening(listen: bool) -> Iterator[Preemption]:
    """Within the block SIGUSR1 is a warning; outside of it, and without ``listen``, it ends the process. Only the main
    thread can listen."""
    preemption = Preemption()
    if not listen or threading.current_thread() is not threading.main_thread():
        yield preemption
        return

    def on_signal(number: int, frame: object) -> None:
        preemption.warned = True

    before = signal.signal(signal.SIGUSR1, on_signal)
    signal.siginterrupt(signal.SIGUSR1, False)  # system calls of MPI's and torch's go on
    try:
        yield preemption
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL if before is None else before)
