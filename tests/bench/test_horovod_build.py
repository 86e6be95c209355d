"""The parts of ``make horovod`` that need no compiler: edits of the sdist, names in the cache."""

from __future__ import annotations

import importlib.metadata
import io
import sys
import tarfile
from pathlib import Path

import pytest

from bench.core.build_steps import BuildError
from bench.core.mpirun import Mpi
from bench.horovod_build import CXX_STANDARD_FILES, HOROVOD_VERSION, unpack_and_edit, wheel_key

RPATH = "$ORIGIN/../../../.."


def sdist(path: Path, standard: int) -> Path:
    """An archive with the two CMake files, as far as the build edits them."""
    text = f"project(horovod CXX)\n\nset(CMAKE_CXX_STANDARD {standard})\nset(CMAKE_CXX_STANDARD_REQUIRED ON)\n"
    with tarfile.open(path, "w:gz") as archive:
        for name in CXX_STANDARD_FILES:
            entry = tarfile.TarInfo(f"horovod-{HOROVOD_VERSION}/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


def test_the_sdist_is_edited_where_it_must_be(tmp_path: Path) -> None:
    source = unpack_and_edit(sdist(tmp_path / "a.tar.gz", 14), tmp_path / "source", RPATH)
    for name in CXX_STANDARD_FILES:
        text = (source / name).read_text()
        assert "set(CMAKE_CXX_STANDARD 20)" in text
        assert "set(CMAKE_CXX_STANDARD_REQUIRED ON)" in text
        assert "STANDARD 14" not in text
    assert f'set(CMAKE_INSTALL_RPATH "{RPATH};' in (source / "CMakeLists.txt").read_text()


def test_an_unknown_sdist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"CMakeLists\.txt of horovod"):
        unpack_and_edit(sdist(tmp_path / "a.tar.gz", 17), tmp_path / "source", RPATH)


def test_a_wheel_is_shared_only_by_equals(tmp_path: Path) -> None:
    def mpi(kind: str, version: str, library_dir: str) -> Mpi:
        folder = tmp_path / f"{kind}-{version}-{library_dir.replace('/', '_')}"
        folder.mkdir()
        (folder / "mpicxx").write_text(f"#!/bin/sh\necho c++ -I/include -L{library_dir} -lmpi\n")
        (folder / "mpicxx").chmod(0o755)
        return Mpi(kind, version, folder)

    inside = f"{sys.prefix}/lib"
    built_with = [
        ("mpich", "5.0.2", inside),
        ("mpich", "5.0.3", inside),
        ("openmpi", "5.0.2", inside),
        ("mpich", "5.0.2", "/opt/mpi/lib"),
    ]
    keys = [wheel_key(mpi(*one)) for one in built_with]
    assert len(set(keys)) == len(keys)
    assert all(importlib.metadata.version("torch") in key and "/" not in key for key in keys)
    assert sys.prefix.replace("/", "_") not in keys[0]  # another environment with the same versions finds it
