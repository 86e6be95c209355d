"""The plan of an emulated cluster: every command that makes its network, as data (``bench.cluster --raw`` prints it).

    host 0  eth0 ===== port0
    host 1  eth0 ===== port1  switch (a bridge)
    ...                 ...

Each ===== is a veth; both its ends carry a token bucket: one shapes what the host sends, the other what it receives.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import BenchError

HOST_COUNTS = range(2, 9)
INTERFACE = "eth0"
SUBNET = "10.77.0.0/24"  # isolated: no route leads out of the namespaces, so it cannot clash with a real network
PRIVATE_DIR = "/dev/shm/.commlab"  # in each host's own tmpfs
LAUNCHER = f"{PRIVATE_DIR}/launch"

# Its line says that the namespaces exist; SIG_IGN for SIGCHLD makes the kernel reap orphans; read() returns when the
# runner closes the pipe or dies.
PID_1 = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True); sys.stdin.read()"
# $$ is the pid as seen inside; it is printed after unshare(2), so the namespaces exist once it has been read.
SLEEPER = ("unshare", "--net", "--uts", "--ipc", "--mount", "sh", "-c", "echo $$; exec sleep infinity")


class ClusterError(BenchError):
    """The hosts cannot be made here, or not as asked; the message names the command and the remedy."""


@dataclass(frozen=True)
class HostLink:
    """The rate and the delay of every host's link, each way."""

    bits_per_s: int
    delay_ms: float = 0.0

    BURST_S = 0.0105  # the bucket holds this much of the rate: 256 KiB at 200 Mbit/s

    @classmethod
    def parse(cls, rate: str, delay: str = "none") -> HostLink:
        """From "200mbit", "1.5gbit", "800kbit" and "none", "5ms"; ClusterError on anything else."""
        unit = {"kbit": 1_000, "mbit": 1_000_000, "gbit": 1_000_000_000}
        matched = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate.lower())
        late = re.fullmatch(r"(\d+(?:\.\d+)?)ms", delay.lower())
        if matched is None or float(matched[1]) <= 0:
            raise ClusterError(
                f"--rate {rate}: a positive number and a unit is needed: kbit, mbit or gbit, for example 200mbit"
            )
        if late is None and delay != "none":
            raise ClusterError(f"--delay {delay}: `none`, or a number of milliseconds such as 5ms")
        return cls(round(float(matched[1]) * unit[matched[2]]), float(late[1]) if late else 0.0)

    @property
    def bytes_per_s(self) -> float:
        return self.bits_per_s / 8

    @property
    def burst_bytes(self) -> int:
        return max(32 * 1024, round(self.bytes_per_s * self.BURST_S))

    def least_time_s(self, sent_bytes: float) -> float:
        """No way of sending ``sent_bytes`` over one link takes less: a full bucket goes at once, the rest at the
        rate."""
        return max(0.0, sent_bytes - self.burst_bytes) / self.bytes_per_s


@dataclass(frozen=True)
class Setup:
    """One command of the plan, on a host or on the switch (None); {hostK} stands for the pid that owns host K."""

    host: int | None
    command: tuple[str, ...]
    stdin: str = ""


def host_names(hosts: int) -> tuple[str, ...]:
    """New ones at each call: files named after a host in a shared folder must never meet another cluster's."""
    token = secrets.token_hex(3)
    return tuple(f"host{index}-{token}" for index in range(hosts))


def host_addresses(hosts: int) -> tuple[str, ...]:
    return tuple(f"10.77.0.{index + 1}" for index in range(hosts))


def plan(names: Sequence[str], link: HostLink) -> list[Setup]:
    """Every command that makes the network and the hosts' private files, in order; pids are filled in when it runs."""
    addresses = host_addresses(len(names))
    shape = f"root handle 1: tbf rate {link.bits_per_s}bit burst {link.burst_bytes} latency 50ms".split()
    hosts_file = "127.0.0.1 localhost\n::1 localhost ip6-localhost\n"
    for address, name in zip(addresses, names, strict=True):
        # A dual-stack server sees its clients as ::ffff:10.77.0.1 and asks for their name.
        hosts_file += f"{address} {name}\n::ffff:{address} from-{name}\n"
    setup = [
        Setup(None, ("ip", "link", "add", "switch", "type", "bridge")),
        Setup(None, ("ip", "link", "set", "switch", "up")),
    ]
    for k, name in enumerate(names):
        port = f"port{k}"
        setup += [
            Setup(
                None, ("ip", "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", f"{{host{k}}}")
            ),
            Setup(None, ("ip", "link", "set", port, "master", "switch", "up")),
            Setup(None, ("tc", "qdisc", "add", "dev", port, *shape)),
            Setup(k, ("hostname", name)),
            Setup(k, ("ip", "link", "set", "lo", "up")),
            Setup(k, ("ip", "address", "add", f"{addresses[k]}/24", "dev", INTERFACE)),
            Setup(k, ("ip", "link", "set", INTERFACE, "addrgenmode", "none", "up")),  # IPv4 only
            Setup(k, ("tc", "qdisc", "add", "dev", INTERFACE, *shape)),
        ]
        if link.delay_ms:
            late = ("netem", "delay", f"{link.delay_ms}ms", "limit", "100000")
            setup.append(Setup(k, ("tc", "qdisc", "add", "dev", INTERFACE, "parent", "1:1", *late)))
        setup += [
            Setup(k, ("mount", "-t", "sysfs", "sysfs", "/sys")),  # lists the interfaces of this host, not the machine's
            Setup(k, ("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")),
            Setup(k, ("mkdir", PRIVATE_DIR)),
            Setup(k, ("tee", f"{PRIVATE_DIR}/hosts"), hosts_file),
            Setup(k, ("mount", "--bind", f"{PRIVATE_DIR}/hosts", "/etc/hosts")),
            Setup(k, ("tee", LAUNCHER), launcher_script(names)),
            Setup(k, ("chmod", "755", LAUNCHER)),
        ]
    return setup


def enter(target: str) -> list[str]:
    return ["nsenter", "--target", target, "--net", "--uts", "--ipc", "--mount"]


def launcher_script(names: Sequence[str]) -> str:
    """The script that mpirun calls instead of ssh: ``launch [options] HOST COMMAND...``."""
    cases = "".join(f"    {name}) pid={{host{k}}} ;;\n" for k, name in enumerate(names))
    return (
        '#!/bin/sh\nwhile case "$1" in -*) true ;; *) false ;; esac; do shift; done\n'
        f'case "$1" in\n{cases}    *) echo "no emulated host is named $1" >&2; exit 255 ;;\nesac\nshift\n'
        f'exec {" ".join(enter("$pid"))} env --chdir {shlex.quote(os.getcwd())} /bin/sh -c "$*"\n'
    )


def unshare_command() -> list[str]:
    rootless = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *rootless, "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
