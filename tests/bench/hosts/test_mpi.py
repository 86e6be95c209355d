"""MPI across emulated hosts: ranks are on different hosts, and send over the link."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import mpi_or_skip, namespaces_of, needs_hosts

from bench.core.mpirun import Mpi
from bench.hosts.mpi import mpirun_across, rank_environment, rank_variables
from bench.hosts.namespaces import Cluster
from bench.hosts.plan import HostLink

ROOT = Path(__file__).resolve().parents[3]


@needs_hosts
def test_mpi_ranks_are_on_different_hosts_and_pay_for_their_bytes(made: set[str]) -> None:
    mpi, link = mpi_or_skip(), HostLink.parse("100mbit")
    with Cluster(2, link) as cluster:
        made |= namespaces_of(cluster)
        command = mpirun_across(
            mpi, cluster.names, 1, [sys.executable, "-m", "bench.hosts.check", "allreduce", "2000000"]
        )
        process = cluster.start(0, command, rank_environment(mpi, link), stdout=subprocess.PIPE)
        answer = json.loads(process.communicate(timeout=60)[0])
        assert answer["hosts"] == list(cluster.names)
        assert answer["wrong"] == 0
        assert answer["seconds"] >= link.least_time_s(2_000_000)  # 2(P-1)/P of 2 MB


def test_ranks_find_this_checkout_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    variables = rank_variables(Mpi("mpich", "5", Path("bin")), HostLink.parse("200mbit"))
    assert variables["PYTHONPATH"].split(":") == [str(ROOT), "elsewhere"]
