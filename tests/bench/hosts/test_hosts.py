"""Emulated hosts: made, reachable, never faster than their link, and gone whatever happens to their owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.core.mpirun import LauncherError, Mpi, find_mpi
from bench.hosts.check import measure_stream
from bench.hosts.mpi import mpirun_across, rank_environment
from bench.hosts.namespaces import Cluster, missing
from bench.hosts.plan import ClusterError, Link, host_names, plan

ROOT = Path(__file__).resolve().parents[3]
REASON = missing()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=f"no emulated hosts here: {REASON}")
FAST = Link.parse("1gbit")
GONE_S = 5.0


def namespaces_in_use() -> set[str]:
    """The network namespaces that have a process in them: a namespace without a name lives exactly as long as those."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(entry))
        except OSError:  # ended while we looked, or not ours to see
            continue
    return found


def outside_state() -> tuple[object, ...]:
    """What a cluster must not change on the machine: links, addresses, named namespaces, mounts, names."""
    addresses = subprocess.run(["ip", "-brief", "address"], check=True, capture_output=True, text=True).stdout
    named = sorted(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else []
    return addresses, named, Path("/proc/self/mounts").read_text(), Path("/etc/hosts").read_text(), os.uname().nodename


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


def namespaces_of(cluster: Cluster) -> set[str]:
    places = (None, *range(len(cluster.names)))
    return {output(cluster, place, "readlink", "/proc/self/ns/net").strip() for place in places}


@pytest.fixture
def made() -> Iterator[set[str]]:
    """A test adds its cluster's namespaces here; afterwards they must be gone and the machine look as before."""
    before, spaces = outside_state(), set[str]()
    yield spaces
    assert len(spaces) >= 3
    assert outside_state() == before
    assert wait_until(lambda: not spaces & namespaces_in_use(), GONE_S), spaces & namespaces_in_use()


def output(cluster: Cluster, host: int | None, *command: str) -> str:
    process = cluster.start(host, command, stdout=subprocess.PIPE)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 0, command
    return text


def mpi_or_skip() -> Mpi:
    try:
        return find_mpi()
    except LauncherError as error:
        pytest.skip(str(error))


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
@pytest.mark.parametrize("rate", ["20mbit", "200mbit"])
def test_no_stream_is_faster_than_the_link(rate: str, made: set[str]) -> None:
    link = Link.parse(rate)
    with Cluster(2, link) as cluster:
        made |= namespaces_of(cluster)
        arrived_bytes, seconds, _ = measure_stream(cluster, 0, 1, seconds=0.7)
    # Only from above: a busy machine may be slower. The clock starts when the first bytes have already arrived, so one
    # bucket of each of the two shapers can lie in between them and the clock.
    assert seconds >= link.least_time_s(arrived_bytes - link.burst_bytes)
    assert arrived_bytes > link.burst_bytes


@needs_hosts
def test_mpi_ranks_are_on_different_hosts_and_pay_for_their_bytes(made: set[str]) -> None:
    mpi, link = mpi_or_skip(), Link.parse("100mbit")
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


RUNNER = """
import signal
import sys
# Started from a background job, it would inherit a signal that is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from bench.hosts.namespaces import Cluster
from bench.hosts.plan import Link
with Cluster(2, Link.parse("1gbit")) as cluster:
    for place in (None, 0, 1):
        cluster.start(place, ["readlink", "/proc/self/ns/net"]).wait()
    cluster.run(1, ["sh", "-c", sys.argv[1]])
"""


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


@needs_hosts
def test_sigterm_ends_the_command_line_and_its_ranks() -> None:
    mpi_or_skip()
    mark = uuid.uuid4().hex
    runner = subprocess.Popen(
        [sys.executable, "-m", "bench.cluster", "--hosts", "2", "--", "sh", "-c", f"echo rank; sleep 1000; : {mark}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert runner.stdout is not None
    with runner.stdout:
        assert [runner.stdout.readline() for _ in range(2)] == ["rank\n", "rank\n"]  # streamed, not kept to the end
        runner.terminate()
        assert runner.wait(timeout=20) == 128 + signal.SIGTERM
    assert wait_until(lambda: not running(mark), GONE_S), running(mark)


@pytest.mark.skipif(sys.platform != "linux", reason="the command line is tested where clusters can be")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--hosts", "1", "--", "true"], "2 to 8 hosts"),
        (["--hosts", "9", "--", "true"], "2 to 8 hosts"),
        (["--rate", "fast", "--", "true"], "--rate fast"),
        (["--rate", "0mbit", "--", "true"], "positive"),
        (["--delay", "5", "--", "true"], "--delay 5"),
        ([], "give a command"),
        (["--check", "--", "true"], "not both"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.cluster", *arguments],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert says in done.stderr


def test_the_plan_names_every_host_once_and_shapes_both_ends_of_every_link() -> None:
    link = Link.parse("250kbit", "2.5ms")
    names = host_names(5)
    setup = plan(names, link)
    assert len(set(names) | set(host_names(5))) == 10
    assert [s.command[1] for s in setup if s.command[0] == "hostname"] == list(names)
    shaped = [(s.place, s.command[4]) for s in setup if "tbf" in s.command]
    assert sorted(shaped, key=str) == sorted(
        [(k, "eth0") for k in range(5)] + [(None, f"port{k}") for k in range(5)], key=str
    )
    assert all("250000bit" in s.command for s in setup if "tbf" in s.command)
    assert [s.place for s in setup if "netem" in s.command] == list(range(5))
    assert link.least_time_s(link.burst_bytes + 31_250) == pytest.approx(1.0)
