"""Which MPI an environment has, and what it wants: stand-ins for ``mpirun`` that answer as each MPI's does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.core.mpirun import LauncherError, find_mpi, intel_variables

ANSWERS = {
    "mpich": ("echo 'HYDRA build details:'; echo '    Version: 5.0.2'", "MPICH 5.0.2"),
    "openmpi": ("echo 'mpirun (Open MPI) 5.0.11'", "Open MPI 5.0.11"),
    # Intel's is a script: it runs a program that lies beside it, and finds that on PATH only.
    "impi": ("mpiexec.hydra", "Intel MPI 2021.18"),
}


def executable(file: Path, line: str) -> None:
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an environment's Python, which is not on PATH."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    executable(tmp_path / "mpiexec.hydra", "echo 'Intel(R) MPI Library for Linux* OS, Version 2021.18 Build 20260626'")
    return tmp_path


@pytest.mark.parametrize("kind", ANSWERS)
def test_the_mpi_beside_python_is_found(beside: Path, kind: str) -> None:
    """Also where the environment was not activated."""
    line, title = ANSWERS[kind]
    executable(beside / "mpirun", line)
    mpi = find_mpi(kind)
    assert (mpi.kind, mpi.title, mpi.bin_dir) == (kind, title, beside)
    with pytest.raises(LauncherError, match=f"another was asked for, but .* is {kind} "):
        find_mpi("another")


def test_what_is_no_mpi_is_quoted(beside: Path) -> None:
    executable(beside / "mpirun", "echo 'slurm 23'")
    with pytest.raises(LauncherError, match=r"is none of MPICH, Open MPI, Intel MPI; .* says: 'slurm 23'"):
        find_mpi()


def test_fabrics_of_intel_mpi_lie_where_the_release_has_them(tmp_path: Path) -> None:
    """A wrong folder would leave Intel MPI without a network, and only between nodes."""
    (tmp_path / "lib").mkdir()
    assert intel_variables(tmp_path)["FI_PROVIDER_PATH"] == str(tmp_path / "lib")
    (tmp_path / "lib/libfabric").mkdir()
    assert intel_variables(tmp_path)["FI_PROVIDER_PATH"] == str(tmp_path / "lib/libfabric")
