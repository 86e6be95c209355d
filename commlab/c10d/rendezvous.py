"""Under plain mpirun there is no RANK and no MASTER_ADDR, and torch's ``env://`` would give up: ranks meet over MPI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from importlib import import_module
from typing import Any


def without_torch_variables(environ: Mapping[str, str]) -> bool:
    """Whether a launcher of MPI started this process, and nobody has set torch's variables."""
    from ..job.launch import detect

    return "RANK" not in environ and detect(environ).launcher is not None


def meet_under_mpirun() -> None:
    """Let ``env://`` meet over MPI where it would raise for want of RANK. A second call does nothing."""
    # Not `import ... as`: torch.distributed has a function of the same name.
    torch_rendezvous = import_module("torch.distributed.rendezvous")
    handlers: dict[str, Any] = torch_rendezvous._rendezvous_handlers
    original = handlers["env"]
    if getattr(original, "commlab", False):
        return

    def meet(url: str, timeout: timedelta = torch_rendezvous.default_pg_timeout, **options: Any) -> Iterator[Any]:
        import os

        if "rank=" in url or not without_torch_variables(os.environ):
            yield from original(url, timeout=timeout, **options)
            return
        yield _over_mpi(timeout)
        raise RuntimeError("Unable to perform re-rendezvous under mpirun")

    meet.commlab = True  # type: ignore[attr-defined]
    handlers["env"] = meet


def _leave(code: int) -> None:
    """End this process at once; every launcher ends the others when one leaves with an error. init_process_group wraps
    the exception hook in one of its own, which keeps what is written until the hook returns, and this one does not."""
    import io
    import os
    import sys

    if isinstance(sys.stderr, io.StringIO):
        os.write(2, sys.stderr.getvalue().encode())
    os._exit(code)


def _over_mpi(timeout: timedelta) -> tuple[Any, int, int]:
    """The store, rank and size. Collective over the job. From here on an unhandled exception of one rank ends all of
    them: nobody else does it under mpirun, where a rank that fails waits for the others in MPI_Finalize."""
    import os

    from ..job.launch import detect, install_exception_hook
    from ..transport.rendezvous import store_for

    launch = detect()
    install_exception_hook(_leave)
    store = store_for(launch, timeout.total_seconds())
    # Programs read these under torchrun; set last, so that a meeting that failed can be repeated.
    variables = {
        "RANK": launch.rank,
        "WORLD_SIZE": launch.size,
        "LOCAL_RANK": launch.local_rank,
        "LOCAL_WORLD_SIZE": launch.local_size,
    }
    for name, value in variables.items():
        os.environ.setdefault(name, str(value))
    return store, launch.rank, launch.size
