"""One training run as a job of its own: ``python -m commlab.train`` under mpirun, on this machine or on emulated hosts.

A job per run, because strategies leave things behind in a process: Horovod's thread, torch's process group, buckets.
"""

from __future__ import annotations

import contextlib
import json
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

from ..core.mpirun import Mpi, mpirun_environment
from ..hosts.mpi import mpirun_across, rank_environment
from ..hosts.namespaces import Cluster
from ..hosts.plan import Link


class JobFailed(RuntimeError):
    """A run ended with an error; the message is what the trainer said."""


@dataclass(frozen=True)
class Measured:
    """What one run reports. Times are medians over the steps, in seconds; the first two steps are left out."""

    tokens_per_step: int
    step_s: float
    compute_s: float
    """Forward and backward of the rank that took longest, step by step."""
    exchange_s: float
    """By rank 0, less what it waited for ranks that computed longer."""
    update_s: float
    """By rank 0."""
    loss: float
    held_out_bits: float
    bytes_sent: int
    """By the rank that sends most, in a step, as commlab's executor counts it: without what a library sends by
    itself."""
    interface_bytes: float | None
    """What rank 0's host sent in a step, by its interfaces' counters, headers included; None on one node."""
    memory_bytes: int
    """Of all ranks together; shared pages once."""
    nodes: int
    versions: dict[str, str]


class Launcher:
    """How jobs are started: a command line in front of ``python``, and an environment. ``threads``: torch threads per
    rank, or None for what the trainer takes."""

    def __init__(self, mpi: Mpi, timeout_s: float):
        self.mpi, self.timeout_s = mpi, timeout_s

    def command(self, ranks: int, python: Sequence[str]) -> list[str]:
        if ranks == 1:
            return list(python)
        bind = ["--bind-to", "none"] if self.mpi.kind == "openmpi" else []
        return [self.mpi.mpirun, *bind, "-n", str(ranks), *python]

    def start(self, ranks: int, python: Sequence[str], output: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(
            self.command(ranks, python),
            env={**mpirun_environment(self.mpi), "PYTHONPATH": _path()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class Hosts(Launcher):
    """The same on emulated hosts; one rank is one host's."""

    def __init__(self, mpi: Mpi, timeout_s: float, cluster: Cluster, ranks_per_host: int):
        super().__init__(mpi, timeout_s)
        self.cluster, self.ranks_per_host = cluster, ranks_per_host

    def command(self, ranks: int, python: Sequence[str]) -> list[str]:
        if ranks == 1:
            return list(python)
        return mpirun_across(self.mpi, self.cluster.names[: ranks // self.ranks_per_host], self.ranks_per_host, python)

    def start(self, ranks: int, python: Sequence[str], output: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(
            self.cluster.on(0, self.command(ranks, python)),
            env={**rank_environment(self.mpi, self.cluster.link), "PYTHONPATH": _path()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextlib.contextmanager
def launcher(mpi: Mpi, timeout_s: float, hosts: int, rate: str, delay: str, per_host: int) -> Iterator[Launcher]:
    """For this machine, or with ``hosts`` for that many emulated ones, which exist inside the block."""
    if not hosts:
        yield Launcher(mpi, timeout_s)
        return
    with Cluster(hosts, Link.parse(rate, delay)) as cluster:
        yield Hosts(mpi, timeout_s, cluster, per_host)


def train(where: Launcher, ranks: int, flags: Sequence[str]) -> Measured:
    """Run it to its end. JobFailed with what it said, also when it is not done in time."""
    return _measured(metrics(where, ranks, flags))


def metrics(
    where: Launcher, ranks: int, flags: Sequence[str], module: Sequence[str] = ("commlab.train",)
) -> list[dict[str, Any]]:
    """The lines of its metrics file. ``module``: what is run in the trainer's place, with what it is given before the
    trainer's flags."""
    with tempfile.TemporaryDirectory() as folder:
        written, said = Path(folder, "metrics.jsonl"), Path(folder, "output.txt")
        python = [sys.executable, "-m", *module, *flags, "--metrics", str(written), "--output", folder]
        with open(said, "wb") as output:
            job = where.start(ranks, python, output)
            try:
                code = job.wait(where.timeout_s)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.pid, signal.SIGTERM)
                job.wait(30)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise JobFailed(f"not done after {where.timeout_s:g} s: {shlex.join(python)}") from error
                raise
        if code:
            raise JobFailed(_reason(said.read_text(errors="replace"), code))
        return [json.loads(line) for line in written.read_text().splitlines()]


def _path() -> str:
    return os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]))


def _reason(output: str, code: int) -> str:
    """The trainer's own line about a usage error, else the last line that anybody said."""
    lines = [line for line in output.replace("\r", "\n").splitlines() if line.strip()]
    told = [line.removeprefix("commlab: ") for line in lines if line.startswith("commlab: ")]
    return told[0] if told else f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"


def _measured(lines: list[dict[str, Any]]) -> Measured:
    opening, summary = lines[0], next(line["summary"] for line in lines if "summary" in line)
    steps = [line for line in lines if "loss" in line]
    steps = steps[min(2, len(steps) - 1) :]
    links = [step["interface_bytes_sent"] for step in steps if "interface_bytes_sent" in step]
    return Measured(
        tokens_per_step=int(median(step["tokens"] for step in steps)),
        step_s=median(step["step_s"] for step in steps),
        compute_s=median(each.get("slowest_compute_s", each["forward_s"] + each["backward_s"]) for each in steps),
        exchange_s=median(each["exchange_s"] - each.get("waited_s", 0.0) for each in steps),
        update_s=median(each["update_s"] for each in steps),
        loss=summary["last_loss"],
        held_out_bits=summary["held_out_bits_per_byte"],
        bytes_sent=max(summary["bytes_sent_per_rank_and_step"]),
        interface_bytes=median(links) if links else None,
        memory_bytes=sum(summary["memory_bytes_per_rank"]),
        nodes=opening["nodes"],
        versions=opening["versions"],
    )
