"""What tests of emulated hosts share: whether there can be any here, and what runs on them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.core.mpirun import LauncherError, Mpi, find_mpi
from bench.hosts.namespaces import Cluster, missing
from bench.hosts.plan import HostLink

REASON = missing()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=f"no emulated hosts here: {REASON}")
FAST = HostLink.parse("1gbit")
GONE_S = 5.0


def running(mark: str) -> list[int]:
    """Processes of this machine, those inside namespaces too, with `mark` on their command line."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in entry.read_bytes():
                pids.append(int(entry.parent.name))
        except OSError:
            continue
    return pids


def wait_until(condition: Callable[[], object], limit_s: float) -> bool:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def output(cluster: Cluster, host: int | None, *command: str) -> str:
    process = cluster.start(host, command, stdout=subprocess.PIPE)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 0, command
    return text


def namespaces_of(cluster: Cluster) -> set[str]:
    places = (None, *range(len(cluster.names)))
    return {output(cluster, place, "readlink", "/proc/self/ns/net").strip() for place in places}


def mpi_or_skip() -> Mpi:
    try:
        return find_mpi()
    except LauncherError as error:
        pytest.skip(str(error))
