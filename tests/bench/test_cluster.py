"""bench.cluster from the command line: bad arguments are refused, and its end is the end of its ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from emulated import GONE_S, mpi_or_skip, needs_hosts, running, wait_until

ROOT = Path(__file__).resolve().parents[2]


@needs_hosts
def test_sigterm_ends_the_command_line_and_its_ranks() -> None:
    mpi_or_skip()
    mark = uuid.uuid4().hex
    runner = subprocess.Popen(
        [sys.executable, "-m", "bench.cluster", "--hosts", "2", "--", "sh", "-c", f"echo rank; sleep 1000; : {mark}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert runner.stdout is not None
    with runner.stdout:
        assert [runner.stdout.readline() for _ in range(2)] == ["rank\n", "rank\n"]  # streamed, not kept to the end
        runner.terminate()
        assert runner.wait(timeout=20) == 128 + signal.SIGTERM
    assert wait_until(lambda: not running(mark), GONE_S), running(mark)


@pytest.mark.skipif(sys.platform != "linux", reason="the command line is tested where clusters can be")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--hosts", "1", "--", "true"], "2 to 8 hosts"),
        (["--hosts", "9", "--", "true"], "2 to 8 hosts"),
        (["--rate", "fast", "--", "true"], "--rate fast"),
        (["--rate", "0mbit", "--", "true"], "positive"),
        (["--delay", "5", "--", "true"], "--delay 5"),
        ([], "give a command"),
        (["--check", "--", "true"], "not both"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.cluster", *arguments],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert says in done.stderr
