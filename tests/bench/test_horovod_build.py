"""The parts of `make horovod` that need no compiler: steps, lock, edits of the sdist, names in the cache."""

from __future__ import annotations

import importlib.metadata
import io
import multiprocessing
import os
import signal
import sys
import tarfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from bench.core.build_steps import BuildError, Steps, file_lock, progress
from bench.core.mpirun import Mpi
from bench.horovod_build import CXX_STANDARD_FILES, HOROVOD_VERSION, unpack_and_edit, wheel_key

RPATH = "$ORIGIN/../../../.."


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_a_failed_step_names_itself_its_output_and_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(tmp_path / "log", timeout_s=30)
    steps.run("first", python("print('well done')"))
    with pytest.raises(BuildError) as failed:
        steps.run("second", python("import sys; print('no such header'); sys.exit(3)"))
    for part in ("step 2 (second)", "exit code 3", "no such header", str(tmp_path / "log")):
        assert part in str(failed.value)
    log = (tmp_path / "log").read_text()
    assert "well done" in log
    assert "no such header" in log
    assert capsys.readouterr().out.startswith("[1] first: 0 s")


def test_a_step_out_of_time_ends_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    program = f"""
import subprocess
sleep = subprocess.Popen(["sleep", "100"])
open({str(child)!r}, "w").write(str(sleep.pid))
sleep.wait()
"""
    with pytest.raises(BuildError, match=r"still running after 1 s"):
        Steps(tmp_path / "log", timeout_s=1).run("slow", python(program))
    deadline_s = time.monotonic() + 5
    while Path(f"/proc/{child.read_text()}").exists():
        assert time.monotonic() < deadline_s, "the step's child outlived it"
        time.sleep(0.02)


def test_progress_is_the_last_count_of_this_step(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("[ 99%] Linking of the step before\n")
    offset = log.stat().st_size
    assert progress(log, offset) == ""
    with open(log, "a") as stream:
        stream.write(
            "[  7%] Building CXX object a/b/first.cc.o\nwarning: x\n[ 42%] Building CXX object a/ring.cc.o\nc++ -c\n"
        )
    assert progress(log, offset) == "42% ring.cc.o"
    with open(log, "a") as stream:
        stream.write("[7/19] Linking CXX shared library x/lib.so\n")
    assert progress(log, offset) == "7/19 lib.so"


def hold(path: Path, held: Event) -> None:
    with file_lock(path, 5, path):
        held.set()
        time.sleep(60)


def test_one_build_at_a_time_and_a_dead_one_does_not_count(tmp_path: Path) -> None:
    lock, context = tmp_path / "lock", multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=hold, args=(lock, held))
    holder.start()
    assert held.wait(30)
    with pytest.raises(BuildError, match="another process still holds"), file_lock(lock, 0.3, tmp_path / "its-log"):
        pass
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(10)
    with file_lock(lock, 5, tmp_path / "its-log"):
        pass


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
