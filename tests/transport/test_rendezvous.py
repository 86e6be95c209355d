"""The wait for a store that is not open yet, where the system has few ports to choose from: who asks from the port that
it asks for has connected to itself."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time

import pytest

from commlab.transport.rendezvous import until_open

PROGRAM = """
import socket, threading, time
from commlab.transport.rendezvous import until_open

opened = []

def serve():
    time.sleep(1.5)
    with socket.create_server(("127.0.0.1", 40002)) as server:
        opened.append(True)
        server.settimeout(20)
        server.accept()

thread = threading.Thread(target=serve)
thread.start()
until_open("127.0.0.1", 40002, 20.0)
assert opened, "somebody answered before there was anybody"
thread.join()
print("met")
"""


def test_nobody_meets_itself() -> None:
    """In a network of its own, with eight ports."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs unshare and ip")
    prepare = "ip link set lo up && echo '40000 40007' > /proc/sys/net/ipv4/ip_local_port_range"
    command = ["unshare", "--net", "sh", "-c", f'{prepare} || exit 77; exec "$0" -c "$1"', sys.executable, PROGRAM]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    if found.returncode == 77 or "unshare failed" in found.stderr:
        pytest.skip(f"no network of its own: {found.stderr.strip()}")
    assert found.returncode == 0 and found.stdout == "met\n", found.stderr


def test_a_store_that_never_opens() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        started_s = time.monotonic()
        with pytest.raises(TimeoutError, match="refused"):
            until_open("127.0.0.1", held.getsockname()[1], 0.3)
        assert time.monotonic() - started_s >= 0.3
    with pytest.raises(TimeoutError, match=r"[Nn]ame|known"):
        until_open("no-such-host.invalid", 29500, 0.2)
