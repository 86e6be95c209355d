"""Start whole jobs under mpirun and torchrun, and see how they end."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import commlab
from bench.core.mpirun import LauncherError, Mpi, find_mpi, launcher_variables

BIN = Path(sys.executable).parent
ENDED_S = 2.0
"""How fast all ranks must be gone. On a busy machine the launcher may need longer to notice: see :func:`gone_soon`."""
BUSY = 10
LAUNCH_S = 120.0
LAUNCHER_S = 10.0
"""How long a launcher may take to return once all ranks are gone."""

HEAD = """
import os, signal, sys, time
import torch
import commlab
def say(*words):
    # One write: lines of several ranks must not be mixed.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
say("pid", os.getpid())
"""


@cache
def _mpi() -> Mpi | None:
    try:
        return find_mpi()
    except LauncherError:
        return None


def environment(**more: str) -> dict[str, str]:
    """This process's, less a launcher's variables, plus the package under test and what this environment's mpirun
    wants."""
    mpi = _mpi()
    keep = {
        name: value
        for name, value in os.environ.items()
        if not re.match(r"(PMI|OMPI_|PMIX_|PRTE_|SLURM_|RANK$|WORLD_SIZE$)", name)
    }
    path = [str(Path(commlab.__file__).parents[1]), *filter(None, [keep.get("PYTHONPATH")])]
    return (
        keep
        | {
            "PATH": f"{BIN}{os.pathsep}{keep.get('PATH', '')}",
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": "1",
        }
        | ({} if mpi is None else launcher_variables(mpi))
        | more
    )


@dataclass
class Job:
    """A job that has ended."""

    code: int
    output: str
    ended_s: float
    """On the wall clock."""

    @property
    def pids(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"^pid (\d+)$", self.output, re.MULTILINE)]

    def said(self, word: str) -> list[str]:
        """What follows ``word`` in the lines that begin with it."""
        return re.findall(rf"^{word} (.*)$", self.output, re.MULTILINE)


def start(
    command: list[str], program: str, tmp_path: Path, own_group: bool = False, **environ: str
) -> subprocess.Popen[str]:
    """``own_group``: its processes are a group of their own, as those that a terminal starts, which Ctrl-C reaches."""
    script = tmp_path / "program.py"
    script.write_text(HEAD + program)
    return subprocess.Popen(
        [*command, str(script)],
        env=environment(**environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0 if own_group else None,
    )


def finish(process: subprocess.Popen[str], already: str = "") -> Job:
    """The job, once its launcher has returned. Open MPI's prterun waits for ever on a futex of its own after about one
    in 50 jobs that end by MPI_Abort, with no process of the job left: such a launcher is killed, and the job has ended
    when its last process had."""
    deadline, had_ranks, ended_s = time.monotonic() + LAUNCH_S, False, 0.0
    while True:
        try:
            output, _ = process.communicate(timeout=1.0)
            return Job(process.returncode, already + output, ended_s or time.time())
        except subprocess.TimeoutExpired:
            left = any(map(lives, _children(process.pid)))
        had_ranks |= left
        if left or not had_ranks or "mpirun" not in str(process.args):
            ended_s = 0.0
        elif not ended_s:
            ended_s = time.time()
        elif time.time() - ended_s > LAUNCHER_S:
            print("the launcher hung with no process of its job left, and was killed")
            process.kill()
        if time.monotonic() > deadline:
            process.kill()
            output, _ = process.communicate()
            pytest.fail(f"the job was still there after {LAUNCH_S:.0f} s; so far it had said:\n{already}{output}")


def _children(pid: int) -> list[int]:
    """The processes that ``pid`` has started."""
    found = []
    for each in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(each.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(each.parent.name))
    return found


def mpirun(ranks: int) -> list[str]:
    """The command under which a program runs on so many ranks."""
    mpi = _mpi()
    if mpi is None:
        pytest.skip("no mpirun on the path")
    return [mpi.mpirun, "-n", str(ranks), sys.executable]


def free_port() -> int:
    """A port on which nobody listens, below those that the kernel gives to connections: none of these takes it before
    the job listens."""
    beyond = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.SystemRandom().sample(range(beyond // 2, beyond), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError(f"100 ports from {beyond // 2} to {beyond} are all taken")


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]


def lives(pid: int) -> bool:
    """Whether there is such a process, and more of it than an exit code that nobody has asked for yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def gone_soon(job: Job, since_s: float) -> None:
    """All ranks of the job are gone, and the launcher returned in time (a busy machine is given more)."""
    deadline = time.monotonic() + ENDED_S
    left = job.pids
    while left and time.monotonic() < deadline:
        left = list(filter(lives, left))
        time.sleep(0.01)
    assert not left, f"ranks {left} live on:\n{job.output}"
    took_s = job.ended_s - since_s
    print(f"ended after {took_s:.3f} s")
    cores_wanted = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert took_s < ENDED_S * min(BUSY, cores_wanted), (
        f"{took_s:.1f} s, on {cores_wanted:.1f} times too few cores:\n{job.output}"
    )
