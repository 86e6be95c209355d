"""What a container may use: the limits of this process's control groups, both versions, on memory and on CPU time.

A limit of any group above holds too, so each is followed from this process's own group up to the top that can be seen.
Where the top of a hierarchy is the container's own (a namespace), that is where the walk ends.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_UNLIMITED_BYTES = 2**60
"""Version 1 writes no limit as the largest multiple of a page."""


class CpuQuota(NamedTuple):
    """How many cores' time the processes of ``group`` may use together; infinite: no limit."""

    cores: float
    group: str


NO_QUOTA = CpuQuota(math.inf, "")


def _number(path: Path) -> int | None:
    """The number in the file; None where there is no file, or no number in it (``max``)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _unescaped(text: str) -> str:
    """A path of mountinfo, which has blanks in octal."""
    for code, character in (("040", " "), ("011", "\t"), ("012", "\n"), ("134", "\\")):
        text = text.replace(f"\\{code}", character)
    return text


def _mounts(root: Path) -> Iterator[tuple[int, set[str], str, Path]]:
    """(version, controllers of version 1, top group, mount point) of each mounted hierarchy."""
    with suppress(OSError):
        for line in (root / "proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
            before, separator, after = line.partition(" - ")
            fields, kind = before.split(), after.split()
            if not separator or len(fields) < 5 or not kind or kind[0] not in ("cgroup", "cgroup2"):
                continue
            controllers = set(kind[2].split(",")) if len(kind) > 2 and kind[0] == "cgroup" else set()
            point = root / _unescaped(fields[4]).lstrip("/")
            yield 2 if kind[0] == "cgroup2" else 1, controllers, _unescaped(fields[3]), point


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """(version, folder) of this process's group for ``controller`` and of all groups above that can be seen, the own
    one first."""
    own: dict[str, str] = {}
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines():
            _, named, path = line.split(":", 2)
            own.update(dict.fromkeys(named.split(","), path))
    for version, controllers, top, point in _mounts(root):
        key = "" if version == 2 else controller
        if key not in own or (version == 1 and controller not in controllers):
            continue
        path, top = own[key].strip("/"), top.strip("/")
        if path == top or path.startswith(f"{top}/"):
            path = path[len(top) :].strip("/")
        elif top:
            path = ""  # mounted from elsewhere: its top is the nearest that can be seen
        names = [name for name in path.split("/") if name not in ("", ".")]
        if ".." in names:
            names = []
        for depth in range(len(names), -1, -1):
            yield version, point.joinpath(*names[:depth])


def _memory_left(version: int, group: Path) -> int | None:
    """Bytes that a group may still take; None: no limit. Pages of files that nobody has used lately are given up
    first, so they count as free."""
    limit = _number(group / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
    used = _number(group / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
    if limit is None or used is None or limit >= _UNLIMITED_BYTES:
        return None
    name = "inactive_file" if version == 2 else "total_inactive_file"
    with suppress(OSError, ValueError, StopIteration):
        lines = (group / "memory.stat").read_text().splitlines()
        used -= int(next(line.split()[1] for line in lines if line.split()[:1] == [name]))
    return max(0, limit - max(0, used))


def available_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes that can be had without pushing anybody out, as the kernel and this process's control groups say, and what
    the limit is; empty: the memory of the host. ``root``: where /proc and /sys are."""
    found: list[tuple[int, str]] = []
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found.append((int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024, ""))
    for version, group in _groups("memory", root):
        left = _memory_left(version, group)
        if left is not None:
            found.append((left, f"the memory limit of the container, {group}"))
    return min(found, default=(2**63, ""))


def cpu_quota(root: Path = Path("/")) -> CpuQuota:
    """The narrowest limit on CPU time that holds for this process. ``root``: where /proc and /sys are."""
    quotas = [NO_QUOTA]
    for version, group in _groups("cpu", root):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if version == 2:
                limit, period = (group / "cpu.max").read_text().split()
                if limit == "max":
                    continue
            else:
                limit = (group / "cpu.cfs_quota_us").read_text()
                period = (group / "cpu.cfs_period_us").read_text()
            if int(limit) > 0:
                quotas.append(CpuQuota(int(limit) / int(period), str(group)))
    return min(quotas)


def own_cores() -> frozenset[int]:
    """The cores that this process may run on: the affinity mask where there is one."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def usable_cores() -> int:
    """How many cores this process can keep busy: those that it may run on, or fewer where a quota limits its time."""
    return whole_cores(len(own_cores()), cpu_quota().cores)


def whole_cores(cores: int, quota: float) -> int:
    """Cores that can be kept busy all the time; one at least."""
    return max(1, min(cores, math.floor(quota + 1e-6) if math.isfinite(quota) else cores))
