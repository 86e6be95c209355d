"""What this machine tells of itself."""

from __future__ import annotations

from pathlib import Path


def memory_bytes() -> int:
    """This process's share of the machine's memory: pages that P processes share count 1/P in each of them (PSS), so
    that the ranks of a node add up to what they really take. 0 where the system does not tell. Cost: milliseconds."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def interface_bytes_sent() -> int:
    """What this host has sent over its network interfaces since it was started, headers and all, whoever sent it: the
    way to see what a library sends that does not say. 0 where the system does not tell."""
    counters = Path("/sys/class/net").glob("*/statistics/tx_bytes")
    return sum(int(counter.read_text()) for counter in counters if counter.parts[-3] != "lo")
