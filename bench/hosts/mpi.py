"""mpirun across emulated hosts: flags and variables with which MPICH and Open MPI start there and send over the link.

All hosts share one kernel. A transport that asks the kernel, not the host name, whether two ranks can share memory
finds that they can, and "sends" at the speed of a memcpy: so each MPI is told to use TCP, on the host's own interface
(and the hosts have IPC namespaces of their own, which is where UCX looks).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..core.mpirun import Mpi, mpirun_environment, python_path
from .plan import INTERFACE, LAUNCHER, PRIVATE_DIR, SUBNET, ClusterError, HostLink


def mpirun_across(mpi: Mpi, names: Sequence[str], ranks_per_host: int, command: Sequence[str]) -> list[str]:
    """The mpirun line, to be run on host 0: rank r lives on host r // ranks_per_host."""
    if ranks_per_host < 1:
        raise ClusterError(f"--ranks-per-host {ranks_per_host}: at least 1 is needed")
    ranks = str(len(names) * ranks_per_host)
    if mpi.kind == "mpich":
        launch = ["-launcher", "ssh", "-launcher-exec", LAUNCHER, "-iface", INTERFACE]
        return [mpi.mpirun, *launch, "-hosts", ",".join(names), "-ppn", str(ranks_per_host), "-n", ranks, *command]
    hosts = ",".join(f"{name}:{ranks_per_host}" for name in names)
    launch = ["--prtemca", "plm_ssh_agent", LAUNCHER, "--prtemca", "prte_if_include", SUBNET]
    return [mpi.mpirun, *launch, "--host", hosts, "--bind-to", "none", "-n", ranks, *command]


def rank_variables(mpi: Mpi, link: HostLink) -> dict[str, str]:
    """The variables that every rank gets on top of the caller's environment."""
    variables = {
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
        "HOROVOD_GLOO_IFACE": INTERFACE,
        "PYTHONPATH": python_path(),
        "COMMLAB_LINK_BYTES_PER_S": f"{link.bytes_per_s:.0f}",  # benchmarks draw their floor from it
        "COMMLAB_LINK_DELAY_MS": f"{link.delay_ms:g}",
    }
    if mpi.kind == "mpich":
        # FI_* is the same for builds on libfabric.
        variables |= {
            "UCX_TLS": "tcp,self",
            "UCX_NET_DEVICES": INTERFACE,
            "FI_PROVIDER": "tcp",
            "FI_TCP_IFACE": INTERFACE,
        }
    else:
        variables |= {
            "PRTE_MCA_prte_tmpdir_base": PRIVATE_DIR,  # its session folders go with the host, even after a kill -9
            "OMPI_MCA_pml": "ob1",
            "OMPI_MCA_btl": "tcp,self,sm",  # ob1 takes sm only between ranks of one host name
            "OMPI_MCA_btl_tcp_if_include": SUBNET,
        }
    return variables


def rank_environment(mpi: Mpi, link: HostLink) -> dict[str, str]:
    """The whole environment for :func:`mpirun_across`; ``python`` in the command is the Python of this process."""
    environment = {**mpirun_environment(mpi), **rank_variables(mpi, link)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return environment
