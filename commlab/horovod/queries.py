"""What Horovod was built with, as its programs ask: they choose by it what to reduce where. commlab moves everything by
itself, so what matters is answered for CPUs, and nothing is said to be there that a program would then rely on."""

from __future__ import annotations

from ..errors import UsageError
from . import timeline, world


def mpi_built(verbose: bool = False) -> bool:
    """Whether ranks may be launched by mpirun: yes, where mpi4py is."""
    from importlib.util import find_spec

    return find_spec("mpi4py") is not None


def mpi_enabled() -> bool:
    """Whether MPI was chosen for the exchange: no, commlab's groups do it."""
    return False


def mpi_threads_supported() -> bool:
    """Whether the program may call MPI from several threads beside the engine: it does not call MPI, so yes."""
    world.require()
    return True


def gloo_built(verbose: bool = False) -> bool:
    """Whether what programs do where gloo is built works here: yes."""
    return True


def gloo_enabled() -> bool:
    """Whether what programs do where gloo is chosen works here, init() after shutdown() for one: yes."""
    return True


def nccl_built(verbose: bool = False) -> int:
    """0: there is no NCCL in commlab."""
    return 0


def ddl_built(verbose: bool = False) -> bool:
    """There is no DDL."""
    return False


def ccl_built(verbose: bool = False) -> bool:
    """There is no oneCCL."""
    return False


def cuda_built(verbose: bool = False) -> bool:
    """Whether tensors are reduced on GPUs: no, they pass through the host's memory."""
    return False


def rocm_built(verbose: bool = False) -> bool:
    """Whether tensors are reduced on GPUs: no."""
    return False


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Record what the engine does from now on: for each operation how long ranks waited for each other, and how long it
    took. ``mark_cycles``: also each exchange of announcements."""
    here = world.require()
    if not isinstance(file_path, str) or not file_path:
        raise UsageError(f"rank {here.group.rank}: start_timeline({file_path!r}): give the path of a file")
    here.engine.settings.mark_cycles = mark_cycles
    timeline.start(file_path)


def stop_timeline() -> None:
    """Write the file on rank 0, for Perfetto or chrome://tracing, and record no more."""
    world.require().engine.settings.mark_cycles = False
    timeline.end()
