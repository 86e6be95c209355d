"""Emulated hosts leave nothing behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated import GONE_S, wait_until


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


@pytest.fixture
def made() -> Iterator[set[str]]:
    """A test adds its cluster's namespaces here; afterwards they must be gone and the machine look as before."""
    before, spaces = outside_state(), set[str]()
    yield spaces
    assert len(spaces) >= 3
    assert outside_state() == before
    assert wait_until(lambda: not spaces & namespaces_in_use(), GONE_S), spaces & namespaces_in_use()
