"""What the operating system reports of this process and this host: memory, and bytes sent."""

from __future__ import annotations

from pathlib import Path


def memory_bytes() -> int:
    """This process's share of the host's memory: a page that P processes share counts 1/P in each of them (PSS), so
    that the sum over a node's ranks is the memory that they take together. 0 where the system does not report the
    number. Cost: milliseconds."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def interface_bytes_sent() -> int:
    """Bytes that this host has sent over its network interfaces since it was started, headers included, by all
    processes: the way to measure a library that does not count its bytes. 0 where the system does not report them."""
    counters = Path("/sys/class/net").glob("*/statistics/tx_bytes")
    return sum(int(counter.read_text()) for counter in counters if counter.parts[-3] != "lo")
