"""Run a command on emulated hosts: `python -m bench.cluster --hosts 4 --rate 200mbit -- python -m bench.allreduce`.

The hosts are network namespaces with shaped links (bench.hosts.namespaces); the command is started on them by the
mpirun of this environment, one or more ranks to a host. The exit code is the command's; 2: no cluster can be made here,
or a bad argument; 124: out of time; 130 and 143: interrupted, terminated. Whatever happens, everything is taken down.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence

from .core import program
from .core.errors import BenchError
from .core.mpirun import MPI_KINDS, Mpi, find_mpi
from .hosts.check import check
from .hosts.mpi import mpirun_across, rank_environment, rank_variables
from .hosts.namespaces import Cluster
from .hosts.plan import SLEEPER, HostLink, host_names, plan, unshare_command

NAME = "bench.cluster"


class Ended(BaseException):
    """SIGTERM or SIGHUP arrived: leave through every ``with``, as for Ctrl-C."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", type=int, default=4, help="2 to 8 (default %(default)s)")
    parser.add_argument(
        "--rate", default="200mbit", help="each host's link, each way: kbit, mbit, gbit (default %(default)s)"
    )
    parser.add_argument(
        "--delay", default="none", help="one way, for example 5ms; needs netem in the kernel (default %(default)s)"
    )
    parser.add_argument(
        "--ranks-per-host", type=int, default=1, help="rank r lives on host r // this (default %(default)s)"
    )
    parser.add_argument(
        "--mpi", choices=("auto", *MPI_KINDS), default="auto", help="must be this environment's (default %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for the command (default %(default)s)")
    parser.add_argument("--raw", action="store_true", help="print the plan, every command in order, and run nothing")
    parser.add_argument(
        "--check", action="store_true", help="measure what the links and the MPI really do, instead of a command"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command every rank runs")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    usage = (__doc__ or "").splitlines()[0]
    parser = program.parser(NAME, usage, arguments, argparse.HelpFormatter)
    options = parser.parse_args(argv)
    options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if bool(options.command) == options.check:
        parser.error("give a command after --, or --check (and not both)")
    return options


def print_plan(options: argparse.Namespace, mpi: Mpi, link: HostLink) -> None:
    """The plan as shell lines, in order; ``{hostK}`` stands for the pid of the sleeper that owns host K."""
    names = host_names(options.hosts)
    print(f"[machine] {shlex.join(unshare_command())} PID-1   # all that follows happens inside")
    for index in range(options.hosts):
        print(f"[switch] {shlex.join(SLEEPER)}   # prints {{host{index}}}")
    for setup in plan(names, link):
        machine = "switch" if setup.host is None else f"host {setup.host}"
        print(f"[{machine}] {shlex.join(setup.command)}" + (f" <<< {shlex.quote(setup.stdin)}" if setup.stdin else ""))
    for name, value in rank_variables(mpi, link).items():
        print(f"[host 0] export {name}={shlex.quote(value)}")
    print("[host 0]", shlex.join(mpirun_across(mpi, names, options.ranks_per_host, options.command)))


def run(options: argparse.Namespace) -> int:
    mpi, link = find_mpi(options.mpi), HostLink.parse(options.rate, options.delay)
    if options.raw:
        print_plan(options, mpi, link)
        return 0
    with Cluster(options.hosts, link) as cluster:
        if options.check:
            return 0 if check(cluster, mpi) else 1
        command = mpirun_across(mpi, cluster.names, options.ranks_per_host, options.command)
        return cluster.run(0, command, rank_environment(mpi, link), options.timeout)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)

    def end(signum: int, frame: object) -> None:
        raise Ended(signum)

    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, end)
    try:
        return run(options)
    except BenchError as error:
        return program.refuse(NAME, error)
    except subprocess.TimeoutExpired:
        print(f"bench.cluster: not done after --timeout {options.timeout:g} s, stopped", file=sys.stderr)
        return 124
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Ended as ended:
        return 128 + ended.signum


if __name__ == "__main__":
    # Lines of ranks appear as they are printed, also through mpirun's pipes.
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
