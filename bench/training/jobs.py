"""One training run as a job of its own: ``python -m commlab.train`` under mpirun, on this machine or on emulated hosts.

A job per run, because strategies leave things behind in a process: Horovod's thread, torch's process group, buckets.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..core.errors import BenchError
from ..core.mpirun import Mpi, mpirun_environment, python_path
from ..hosts.mpi import mpirun_across, rank_environment
from ..hosts.namespaces import Cluster
from ..hosts.plan import HostLink

Line = dict[str, Any]
"""A line of the trainer's metrics file."""


class JobFailed(BenchError):
    """A job ended with an error; the message is the trainer's."""


@dataclass(frozen=True)
class Measured:
    """The report of one training run. Times are medians over the steps, in seconds; the first two steps are left
    out."""

    tokens_per_step: int
    step_s: float
    compute_s: float
    """Forward and backward of the rank that took longest, step by step."""
    exchange_s: float
    """The exchange of rank 0, less the time that rank 0 waited for ranks that computed longer."""
    update_s: float
    """The update of rank 0."""
    loss: float
    held_out_bits: float
    bytes_sent: int
    """Bytes that the rank which sends most sends in a step, as commlab's executor counts them: without the bytes that a
    library sends by itself."""
    interface_bytes: float | None
    """Bytes that rank 0's host sent in a step, by its interfaces' counters, headers included; None on one node."""
    memory_bytes: int
    """The memory of all ranks together; shared pages count once."""
    nodes: int
    versions: dict[str, str]


class Launcher:
    """Starts jobs on this machine: a command line in front of ``python``, and an environment. Jobs of one rank need no
    ``mpi``. ``timeout_s``: how long a job may take."""

    def __init__(self, mpi: Mpi | None, timeout_s: float):
        self.mpi, self.timeout_s = mpi, timeout_s

    def command(self, ranks: int, python: Sequence[str]) -> list[str]:
        if ranks == 1:
            return list(python)
        assert self.mpi is not None
        bind = ["--bind-to", "none"] if self.mpi.kind == "openmpi" else []
        return [self.mpi.mpirun, *bind, "-n", str(ranks), *python]

    def start(self, ranks: int, python: Sequence[str], output: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(
            self.command(ranks, python),
            env={**(mpirun_environment(self.mpi) if self.mpi else os.environ), "PYTHONPATH": python_path()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class ClusterLauncher(Launcher):
    """Starts jobs on emulated hosts, with ``ranks_per_host`` ranks on each; a job of one rank runs on the first
    host."""

    def __init__(self, mpi: Mpi, timeout_s: float, cluster: Cluster, ranks_per_host: int):
        super().__init__(mpi, timeout_s)
        self.across = mpi
        self.cluster, self.ranks_per_host = cluster, ranks_per_host

    def command(self, ranks: int, python: Sequence[str]) -> list[str]:
        if ranks == 1:
            return list(python)
        return mpirun_across(
            self.across, self.cluster.names[: ranks // self.ranks_per_host], self.ranks_per_host, python
        )

    def start(self, ranks: int, python: Sequence[str], output: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(
            self.cluster.on(0, self.command(ranks, python)),
            env=rank_environment(self.across, self.cluster.link),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextlib.contextmanager
def launcher(mpi: Mpi, timeout_s: float, hosts: int, rate: str, delay: str, per_host: int) -> Iterator[Launcher]:
    """A launcher for this machine, or for ``hosts`` emulated hosts, which exist inside the block."""
    if not hosts:
        yield Launcher(mpi, timeout_s)
        return
    with Cluster(hosts, HostLink.parse(rate, delay)) as cluster:
        yield ClusterLauncher(mpi, timeout_s, cluster, per_host)


def train(starter: Launcher, ranks: int, flags: Sequence[str]) -> Measured:
    """Run one training job to its end. JobFailed with the trainer's message, also when the job is not done in time."""
    return measured(metrics(starter, ranks, flags))


def metrics(
    starter: Launcher, ranks: int, flags: Sequence[str], module: Sequence[str] = ("commlab.train",)
) -> list[Line]:
    """Run one training job to its end; returns the lines of its metrics file. JobFailed as for :func:`train`.
    ``module``: the module that is run in the trainer's place, and its arguments before the trainer's flags."""
    with tempfile.TemporaryDirectory() as folder:
        written, printed = Path(folder, "metrics.jsonl"), Path(folder, "output.txt")
        python = [sys.executable, "-m", *module, *flags, "--metrics", str(written), "--output", folder]
        with open(printed, "wb") as output:
            job = starter.start(ranks, python, output)
            try:
                code = job.wait(starter.timeout_s)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.pid, signal.SIGTERM)
                job.wait(30)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise JobFailed(f"not done after {starter.timeout_s:g} s: {shlex.join(python)}") from error
                raise
        if code:
            raise JobFailed(reason_of(printed.read_text(errors="replace"), code))
        return [json.loads(line) for line in written.read_text().splitlines()]


def summary_of(lines: Sequence[Line]) -> dict[str, Any]:
    """The summary at the end of a metrics file."""
    summary: dict[str, Any] = next(line["summary"] for line in lines if "summary" in line)
    return summary


def reason_of(output: str, code: int) -> str:
    """The trainer's own line about a usage error, else the last line of the output."""
    lines = [line for line in output.replace("\r", "\n").splitlines() if line.strip()]
    messages = [line.removeprefix("commlab: ") for line in lines if line.startswith("commlab: ")]
    return messages[0] if messages else f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"


def measured(lines: Sequence[Line]) -> Measured:
    """The report of a training run from the lines of its metrics file."""
    opening, summary = lines[0], summary_of(lines)
    steps = [line for line in lines if "loss" in line]
    steps = steps[min(2, len(steps) - 1) :]
    links = [step["interface_bytes_sent"] for step in steps if "interface_bytes_sent" in step]
    return Measured(
        tokens_per_step=int(median(step["tokens"] for step in steps)),
        step_s=median(step["step_s"] for step in steps),
        compute_s=median(each.get("slowest_compute_s", each["forward_s"] + each["backward_s"]) for each in steps),
        exchange_s=median(each["exchange_s"] - each.get("waited_s", 0.0) for each in steps),
        update_s=median(each["update_s"] for each in steps),
        loss=math.nan if summary["last_loss"] is None else summary["last_loss"],  # null is what JSON has for NaN
        held_out_bits=summary["held_out_bits_per_byte"],
        bytes_sent=max(summary["bytes_sent_per_rank_and_step"]),
        interface_bytes=median(links) if links else None,
        memory_bytes=sum(summary["memory_bytes_per_rank"]),
        nodes=opening["nodes"],
        versions=opening["versions"],
    )
