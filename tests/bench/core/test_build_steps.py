"""Steps of a build: their logs, time limits and progress, and the lock between builds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from bench.core.build_steps import BuildError, Steps, file_lock, progress


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
