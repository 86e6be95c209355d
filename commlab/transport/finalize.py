"""mpi4py's MPI, imported so that a rank itself finalizes MPI at its end, and never a process that it has forked.

mpi4py finalizes MPI at the end of every process that has it, also of a forked child, which the launcher takes for the
end of the rank. Here that is left to a function of the native module that knows whose MPI it is."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any, NoReturn

import mpi4py

from ..native import library

__all__ = ["MPI"]


def _keep_exit_status() -> None:
    """In a forked child that has to end before mpi4py's turn comes: the code that it gives to sys.exit() is its exit
    code all the same."""
    leave = sys.exit

    def leave_with(status: Any = None, /) -> NoReturn:
        library.built.set_child_exit_status(status if isinstance(status, int) else int(status is not None))
        leave(status)

    sys.exit = leave_with


_guarded = getattr(library.built, "finalize_mpi_at_exit", None)
_at_exit = (
    _guarded is not None
    and "mpi4py.MPI" not in sys.modules
    and getattr(mpi4py.rc, "finalize", None) is None
    and "MPI4PY_RC_FINALIZE" not in os.environ
)
if _at_exit:
    mpi4py.rc.finalize = False

from mpi4py import MPI  # noqa: E402

if _guarded is not None:
    _functions = ctypes.CDLL(MPI.__file__)
    _guarded(
        *(
            ctypes.cast(getattr(_functions, name), ctypes.c_void_p).value
            for name in ("MPI_Initialized", "MPI_Finalized", "MPI_Finalize")
        ),
        _at_exit,
    )
    if not _at_exit:
        os.register_at_fork(after_in_child=_keep_exit_status)
