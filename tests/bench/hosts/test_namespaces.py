"""Emulated hosts: made, reachable, and gone whatever happens to their owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from emulated import FAST, GONE_S, namespaces_of, needs_hosts, output, running, wait_until

from bench.hosts.check import measure_stream
from bench.hosts.namespaces import Cluster
from bench.hosts.plan import ClusterError

ROOT = Path(__file__).resolve().parents[3]
RUNNER = """
import signal
import sys
# Started from a background job, it would inherit a signal that is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from bench.hosts.namespaces import Cluster
from bench.hosts.plan import HostLink
with Cluster(2, HostLink.parse("1gbit")) as cluster:
    for place in (None, 0, 1):
        cluster.start(place, ["readlink", "/proc/self/ns/net"]).wait()
    cluster.run(1, ["sh", "-c", sys.argv[1]])
"""


@needs_hosts
def test_hosts_are_separate_and_reach_each_other(made: set[str]) -> None:
    with Cluster(3, FAST) as cluster:
        made |= namespaces_of(cluster)
        assert len(made) == 4
        for k, name in enumerate(cluster.names):
            assert output(cluster, k, "hostname").strip() == name
            assert sorted(output(cluster, k, "ls", "/sys/class/net").split()) == ["eth0", "lo"]
            assert Path(output(cluster, k, "pwd").strip()).samefile(os.getcwd())
            for address, other in zip(cluster.addresses, cluster.names, strict=True):
                assert output(cluster, k, "getent", "hosts", other).split() == [address, other]
        # What one host puts into its shared memory, another does not see.
        output(cluster, 0, "touch", "/dev/shm/mine")
        assert output(cluster, 1, "ls", "/dev/shm") == ""
        spaces = {output(cluster, k, "readlink", "/proc/self/ns/ipc") for k in range(3)} | {
            os.readlink("/proc/self/ns/ipc")
        }
        assert len(spaces) == 4
        # Every ordered pair is connected, and nothing else is: there is no route out.
        for sender, receiver in ((0, 1), (1, 2), (2, 0)):
            assert measure_stream(cluster, sender, receiver, seconds=0.05)[0] > 0
        assert "default" not in output(cluster, 0, "ip", "route")


@needs_hosts
def test_an_exception_takes_everything_down(made: set[str]) -> None:
    mark = uuid.uuid4().hex
    with pytest.raises(ZeroDivisionError), Cluster(2, FAST) as cluster:
        made |= namespaces_of(cluster)
        cluster.start(1, ["sh", "-c", f"trap '' TERM INT HUP; : {mark}; while :; do sleep 1; done"])
        assert wait_until(lambda: running(mark), GONE_S)
        raise ZeroDivisionError
    assert wait_until(lambda: not running(mark), GONE_S)
    with pytest.raises(ClusterError, match="is down"):
        cluster.start(0, ["true"])


@needs_hosts
def test_a_command_out_of_time_is_ended(made: set[str]) -> None:
    mark = uuid.uuid4().hex
    with Cluster(2, FAST) as cluster:
        made |= namespaces_of(cluster)
        assert cluster.run(1, ["sh", "-c", "exit 7"]) == 7
        assert cluster.run(1, ["sh", "-c", "kill -9 $$"]) == 128 + 9
        with pytest.raises(subprocess.TimeoutExpired):
            cluster.run(0, ["sh", "-c", f": {mark}; sleep 100; :"], timeout_s=0.3)
        assert not running(mark)


@needs_hosts
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_the_death_of_the_runner_leaves_nothing(signum: signal.Signals, made: set[str]) -> None:
    mark = uuid.uuid4().hex
    away = f"{mark}-away"  # a child in a session of its own: no signal to the command's process group reaches it
    stubborn = f"trap '' TERM HUP INT; (setsid sh -c 'sleep 1000; : {away}' &); while :; do sleep 1; done"
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, stubborn, mark],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert runner.stdout is not None
    with runner.stdout:
        made |= {runner.stdout.readline().strip() for _ in range(3)}
        assert wait_until(lambda: running(f"sh\0-c\0sleep 1000; : {away}"), GONE_S)
        runner.send_signal(signum)
        assert runner.wait(timeout=20) != 0
    assert wait_until(lambda: not running(mark), GONE_S), running(mark)
