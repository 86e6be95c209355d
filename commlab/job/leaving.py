"""How this process leaves: its exit code, as far as it can be known while the process still lives, for the peers that
wait for it.

Under MPI a rank that has ended its program stays as a process, because MPI_Finalize waits for all ranks; so the exit
code must be told before. Python keeps it to itself: by the time that ``atexit`` runs, the SystemExit is gone. What
remains is evidence: what ``sys.exit`` was called with, the exception that nobody caught, and the outermost frame of the
program, which says whether the program returned or was left by an exception. Where they do not suffice (``raise
SystemExit(3)``), no code is named.
"""

from __future__ import annotations

import dis
import functools
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

_asked: tuple[object, ...] = ()
"""What the main thread called ``sys.exit`` with last; empty while it has not."""
_outermost: FrameType | None = None
"""The first frame of the program, kept: once the program has ended, it says how."""
_replaced: Callable[..., NoReturn] | None = None
"""The ``sys.exit`` that was there before."""

_TEXT_CHARACTERS = 200


def interactive() -> bool:
    """Whether a person types commands into this process, which goes on after an exception: ``python -i``, a
    notebook."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive or sys.flags.inspect)


def observe() -> None:
    """From now on remember what :func:`exit_words` has to know. A second call does nothing."""
    global _outermost, _replaced
    if _replaced is not None:
        return
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    _outermost, really = frame, sys.exit
    _replaced = really

    @functools.wraps(really)
    def leave(*status: Any) -> NoReturn:
        global _asked
        if threading.current_thread() is threading.main_thread():
            _asked = status or (None,)
        really(*status)

    setattr(sys, "exit", leave)  # noqa: B010


def forget() -> None:
    """End what :func:`observe` began."""
    global _asked, _outermost, _replaced
    if _replaced is not None and getattr(sys.exit, "__wrapped__", None) is _replaced:
        setattr(sys, "exit", _replaced)  # noqa: B010
    _asked, _outermost, _replaced = (), None, None


def _returned() -> bool | None:
    """Whether the program came to its end (True) or was left by an exception (False); None: not known."""
    if _outermost is None or interactive():
        return None
    with suppress(IndexError):
        return dis.opname[_outermost.f_code.co_code[_outermost.f_lasti]].startswith("RETURN_")
    return None


def exit_words() -> str:
    """How this process ends, in words for its peers: ``exit code 3``, ``exit code 1: no such file``. Empty where it
    can't be known. For ``atexit``: the program has ended."""
    returned = _returned()
    if returned:
        return "exit code 0"
    error = getattr(sys, "last_value", None)
    if error is not None and not interactive():
        return f"exit code 1: {_short(f'{type(error).__name__}: {error}')}"
    if not _asked:
        return ""
    (status,) = _asked[:1]
    if status is None or isinstance(status, int):
        return f"exit code {int(status or 0) & 0xFF}"
    return f"exit code 1: {_short(str(status))}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _TEXT_CHARACTERS else f"{line[:_TEXT_CHARACTERS]}..."


def status_words(status: int) -> str:
    """A status of ``waitpid``, in words."""
    number = status & 0x7F
    if not number:
        return f"exit code {status >> 8 & 0xFF}"
    try:
        return f"killed by signal {number}, {signal.Signals(number).name}"
    except ValueError:
        return f"killed by signal {number}"
