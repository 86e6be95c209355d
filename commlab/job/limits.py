"""What a container may use: the limits of this process's control groups, both versions, on memory and on CPU time.

A limit of any group above holds too, so each is followed from this process's own group up to the top that can be seen.
Where the top of a hierarchy is the container's own (a namespace), that is where the walk ends.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_UNLIMITED_BYTES = 2**60
"""Version 1 writes no limit as the largest multiple of a page."""


class CpuQuota(NamedTuple):
    """How many cores' time the processes of ``group`` may use together; infinite: no limit."""

    cores: float
    group: str


NO_QUOTA = CpuQuota(math.inf, "")


def _read(path: str) -> str | None:
    """What the file says; None where it can't be read."""
    try:
        with open(path, errors="surrogateescape") as file:
            return file.read()
    except (OSError, ValueError):
        return None


def _number(path: str) -> int | None:
    """The number in the file; None where there is no file, or no number in it (``max``)."""
    try:
        return int(_read(path) or "")
    except ValueError:
        return None


def _unescaped(text: str) -> str:
    """A path of mountinfo, which has blanks in octal."""
    for code, character in (("040", " "), ("011", "\t"), ("012", "\n"), ("134", "\\")):
        text = text.replace(f"\\{code}", character)
    return text


def _mounts(mountinfo: str) -> Iterator[tuple[int, set[str], str, str]]:
    """(version, controllers of version 1, top group, mount point) of each mounted hierarchy."""
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if not separator or len(fields) < 5 or not kind or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = set(kind[2].split(",")) if len(kind) > 2 and kind[0] == "cgroup" else set()
        yield 2 if kind[0] == "cgroup2" else 1, controllers, _unescaped(fields[3]), _unescaped(fields[4])


def _groups(controller: str, root: Path) -> list[tuple[int, str]]:
    """(version, folder) of this process's group for ``controller`` and of all groups above that can be seen, the own
    one first."""
    mountinfo, cgroup = _read(f"{root}/proc/self/mountinfo"), _read(f"{root}/proc/self/cgroup")
    return _groups_of(controller, root, mountinfo or "", cgroup or "")


@lru_cache(maxsize=8)
def _groups_of(controller: str, root: Path, mountinfo: str, cgroup: str) -> list[tuple[int, str]]:
    """The same, from what the files say: every group that is opened asks, and they hardly ever change."""
    own: dict[str, str] = {}
    with suppress(ValueError):
        for line in cgroup.splitlines():
            _, named, path = line.split(":", 2)
            own.update(dict.fromkeys(named.split(","), path))
    found = []
    for version, controllers, top, point in _mounts(mountinfo):
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
        # Not joined to the root: mount points begin with a slash.
        top_folder = Path(f"{root}/{point}")
        found += [(version, str(top_folder.joinpath(*names[:depth]))) for depth in range(len(names), -1, -1)]
    return found


def _memory_left(version: int, group: str) -> int | None:
    """Bytes that a group may still take; None: no limit. Pages of files that nobody has used lately are given up
    first, so they count as free."""
    limit = _number(f"{group}/{'memory.max' if version == 2 else 'memory.limit_in_bytes'}")
    if limit is None or limit >= _UNLIMITED_BYTES:
        return None
    used = _number(f"{group}/{'memory.current' if version == 2 else 'memory.usage_in_bytes'}")
    if used is None:
        return None
    name = "inactive_file" if version == 2 else "total_inactive_file"
    lines = (_read(f"{group}/memory.stat") or "").splitlines()
    with suppress(ValueError, StopIteration):
        used -= int(next(line.split()[1] for line in lines if line.split()[:1] == [name]))
    return max(0, limit - max(0, used))


def available_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes that can be had without pushing anybody out, as the kernel and this process's control groups say, and what
    the limit is; empty: the memory of the host. ``root``: where /proc and /sys are."""
    found: list[tuple[int, str]] = []
    lines = (_read(f"{root}/proc/meminfo") or "").splitlines()
    with suppress(ValueError, IndexError, StopIteration):
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
        with suppress(ValueError, ZeroDivisionError):
            if version == 2:
                limit, period = (_read(f"{group}/cpu.max") or "").split()
                if limit == "max":
                    continue
            else:
                limit = _read(f"{group}/cpu.cfs_quota_us") or ""
                period = _read(f"{group}/cpu.cfs_period_us") or ""
            if int(limit) > 0:
                quotas.append(CpuQuota(int(limit) / int(period), group))
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
