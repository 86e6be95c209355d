"""Emulated hosts: namespaces around one switch, every link shaped, gone without a trace when their owner ends.

    runner --- unshare: a PID namespace and a network namespace of their own (the switch), holding
                 pid 1      ends when the runner's pipe closes, and with it, by the kernel's own rule, everything inside
                 host k     a process that only sleeps, owning a network, UTS, IPC and mount namespace:
                            own eth0, host name, /etc/hosts, /sys, /dev/shm

Nothing is named outside: no `ip netns` entry, no link, no address, no file. So nothing can be left over, whichever way
the runner dies, and two clusters at once do not see each other. The IPC namespace matters: without it UCX finds that
ranks of two hosts can share memory, and an allreduce of 10 MB over 200 Mbit/s took 13 ms here instead of 414.
Needs root, or a kernel that lets users make namespaces.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from .plan import (
    HOST_COUNTS,
    PID_1,
    SLEEPER,
    ClusterError,
    HostLink,
    Setup,
    enter,
    host_addresses,
    host_names,
    plan,
    unshare_command,
)

TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "hostname": "hostname",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "util-linux",
}
SETUP_TIMEOUT_S = 30.0
GRACE_S = 2.0


def missing() -> str | None:
    """Why no cluster can be made on this machine, or None."""
    if sys.platform != "linux":
        return "emulated hosts are Linux namespaces; this is " + sys.platform
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        package = TOOLS[absent[0]]
        return f"{absent[0]} is not installed: install {package} (for example: apt-get install {package})"
    tried = subprocess.run(
        [*unshare_command(), "true"], check=False, capture_output=True, text=True, timeout=SETUP_TIMEOUT_S
    )
    if tried.returncode:
        return f"namespaces cannot be made here, run as root on a machine that allows it: {tried.stderr.strip()}"
    return None


class Cluster:
    """``with Cluster(4, HostLink.parse("200mbit")) as cluster:`` makes the hosts; after the block nothing on them is
    left."""

    def __init__(self, hosts: int, link: HostLink) -> None:
        if hosts not in HOST_COUNTS:
            raise ClusterError(f"--hosts {hosts}: {HOST_COUNTS[0]} to {HOST_COUNTS[-1]} hosts can be made")
        self.names = host_names(hosts)
        self.addresses = host_addresses(hosts)
        self.link = link
        self._owner: subprocess.Popen[str] | None = None
        self._started: list[subprocess.Popen[str]] = []
        self._pids: dict[str, str] = {}  # "host0" -> pid inside the cluster's PID namespace

    def __enter__(self) -> Cluster:
        if reason := missing():
            raise ClusterError(reason)
        try:
            self._up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.down()

    def on(self, host: int | None, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` on a host (None: the switch), in this process's own folder."""
        if self._owner is None:
            raise ClusterError("the cluster is down: use it inside its `with` block")
        proc = f"/proc/{self._owner.pid}/ns"
        into = ["nsenter", "--target", str(self._owner.pid), f"--pid={proc}/pid_for_children", "--net", "--mount"]
        into += [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        hop = [] if host is None else enter(self._pids[f"host{host}"])
        return [*into, *hop, "env", "--chdir", os.getcwd(), *command]

    def start(
        self,
        host: int | None,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        stdout: int | None = None,
    ) -> subprocess.Popen[str]:
        """Start ``command`` on a host (None: the switch), in a process group of its own; the cluster's end is its
        end."""
        process = subprocess.Popen(
            self.on(host, command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(
        self,
        host: int,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Run ``command`` on a host with the caller's stdout and stderr; its exit code, or 128 + n for signal n.

        Raises subprocess.TimeoutExpired after ``timeout_s``. That, Ctrl-C or any other exception reaches the whole
        command as a signal; what has not ended 2 s later is killed.
        """
        process = self.start(host, command, environment)
        try:
            status = process.wait(timeout_s)
        except BaseException as error:
            end_group(process, signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
            raise
        return status if status >= 0 else 128 - status

    def down(self) -> None:
        """End every process on the hosts and with them the namespaces. Safe to call twice."""
        if self._owner is None:
            return
        owner, self._owner = self._owner, None
        assert owner.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            owner.stdin.close()
        try:
            owner.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            owner.kill()  # --kill-child takes pid 1 along
            owner.wait()
        for process in (owner, *self._started):
            process.wait(GRACE_S)
            if process.stdout is not None:
                process.stdout.close()
        self._started.clear()
        self._pids.clear()

    def _up(self) -> None:
        self._owner = subprocess.Popen(
            [*unshare_command(), sys.executable, "-I", "-S", "-c", PID_1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        # Before that line its /proc entry still shows the machine's own namespaces: nothing may be done through it.
        first_line(self._owner, "up")
        for k in range(len(self.names)):
            sleeper = self.start(None, SLEEPER, stdout=subprocess.PIPE)
            self._pids[f"host{k}"] = first_line(sleeper, r"\d+")
        for setup in plan(self.names, self.link):
            self._apply(setup)

    def _apply(self, setup: Setup) -> None:
        command = [filled(word, self._pids) for word in setup.command]
        text = filled(setup.stdin, self._pids)
        done = subprocess.run(
            self.on(setup.host, command),
            check=False,
            input=text,
            capture_output=True,
            text=True,
            timeout=SETUP_TIMEOUT_S,
        )
        if done.returncode:
            machine = "the switch" if setup.host is None else f"host {setup.host}"
            advice = " (this kernel has no netem: use --delay none)" if "netem" in command else ""
            raise ClusterError(f"on {machine}: `{shlex.join(command)}` failed: {done.stderr.strip()}{advice}")


def first_line(process: subprocess.Popen[str], pattern: str) -> str:
    """The line a process prints when its namespaces exist; ClusterError when it ended instead."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if re.fullmatch(pattern, line) is None:
        raise ClusterError(f"{process.args!r} did not come up: exit code {process.wait(GRACE_S)}")
    return line


def filled(text: str, pids: Mapping[str, str]) -> str:
    """``text`` with every {hostK} replaced by the pid that owns host K."""
    return re.sub(r"\{(host\d)\}", lambda found: pids[found[1]], text)


def end_group(process: subprocess.Popen[str], first: signal.Signals) -> None:
    """Signal a command and all its descendants of the same group; kill what is still there after GRACE_S."""
    deadline_s = time.monotonic() + GRACE_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, first)
        while time.monotonic() < deadline_s:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(GRACE_S)
