"""How the ranks of the job meet: all of them within the time limit, or an error that says who has not come."""

from __future__ import annotations

import os
import sys
from typing import Any

from ..errors import PeerTimeoutError, UsageError
from ..job.launch import Launch
from ..job.presence import Presence
from ..native import library
from ..transport.base import Transport

MEET_S = 5.0
"""So long ranks are waited for at least: a launcher starts them, and each imports torch, seconds apart."""

_connected = 0
"""How often this process has begun to connect: the same number on all ranks."""


def connect(transport: str, launch: Launch, timeout_s: float) -> Transport:
    """The transport between all ranks of the job. Collective. PeerTimeoutError where ranks have not come within
    ``timeout_s``, or MEET_S where that is longer."""
    global _connected
    if launch.launcher is None:
        from ..transport.sim import SimNetwork

        return SimNetwork(1).transports()[0]
    if transport == "mpi" and launch.launcher == "torchrun":
        raise UsageError(
            f"rank {launch.rank}: torchrun launched this job, which MPI knows nothing of; use transport 'torch' "
            "(or, if RANK and WORLD_SIZE were set by hand, unset them)"
        )
    _connected += 1
    meet_s = max(timeout_s, MEET_S)
    return _over_gloo(launch, timeout_s, meet_s) if transport == "torch" else _over_mpi(launch, meet_s)


def _over_gloo(launch: Launch, timeout_s: float, meet_s: float) -> Transport:
    from ..transport.rendezvous import everyone_at, store_for
    from ..transport.torchdist import TorchTransport

    if launch.launcher != "torchrun":
        import_mpi(launch, meet_s)
    store = store_for(launch, meet_s)
    # A store may outlive a rank: torchrun's keeps what the ranks before a restart have written, and what this process
    # has written in the job before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"commlab/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}/{_connected}"
    everyone_at(store, prefix, launch.rank, launch.size, meet_s)
    return TorchTransport(store, launch.rank, launch.size, timeout_s, prefix)


def _over_mpi(launch: Launch, timeout_s: float) -> Transport:
    library_name = import_mpi(launch, timeout_s)
    from ..transport.mpi import MpiTransport

    presence = Presence(launch)
    try:
        connected = MpiTransport(timeout_s=timeout_s)
    except PeerTimeoutError as error:
        missing = ", ".join(presence.missing()) or "ranks of other hosts, or who is slow to connect"
        raise PeerTimeoutError(
            f"rank {launch.rank} has waited {timeout_s:g} s in commlab.init() for: {missing}; every rank must call it. "
            "See the other ranks' output, or raise timeout_s"
        ) from error
    finally:
        presence.close()
    if connected.size != launch.size:
        raise UsageError(
            f"rank {launch.rank}: {launch.launcher} launched {launch.size} ranks, but MPI sees "
            f"{connected.size}: mpirun and mpi4py's "
            f"library ({library_name}) belong to different MPIs; use the mpirun that was installed with it"
        )
    return connected


def import_mpi(launch: Launch, timeout_s: float) -> str:
    """Import mpi4py, which calls MPI_Init, which waits for all ranks; returns the name of the MPI library. Where ranks
    have not come within ``timeout_s`` this process ends with a message: there is no way back out of MPI_Init."""
    watchdog: Any = None
    presence: Presence | None = None
    if "mpi4py.MPI" not in sys.modules and hasattr(library.built, "Watchdog"):
        presence = Presence(launch)
        names, words = zip(*presence.peers(), strict=True) if launch.local_size > 1 else ((), ())
        watchdog = library.built.Watchdog(
            timeout_s,
            f"[rank {launch.rank} of {launch.size}] commlab: MPI_Init has waited {timeout_s:g} s; not there: ",
            list(names),
            list(words),
            "ranks of other hosts, or ranks that have come and gone",
        )
    try:
        from ..transport.mpi import library as name_of_library

        return name_of_library()
    except ImportError as error:
        raise UsageError(
            f"rank {launch.rank}: transport mpi needs mpi4py and an MPI library ({error}); give commlab's "
            "checkout a pip install '.[mpich]', or use transport 'torch'"
        ) from error
    finally:
        if watchdog is not None:
            watchdog.stop()
        if presence is not None:
            presence.close()
