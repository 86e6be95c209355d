"""The limits of containers, on folders that are laid out like /proc and /sys of one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from commlab.job.limits import NO_QUOTA, available_memory, cpu_quota, own_cores, usable_cores, whole_cores

GIB = 2**30
V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "33 32 0:29 {top} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"
    "34 32 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
)


def host(root: Path, cgroup: str, mounts: str, files: dict[str, str], free_gib: int = 64) -> Path:
    for name, text in {
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts,
        "proc/meminfo": f"MemTotal: 999 kB\nMemAvailable: {free_gib * 2**20} kB\n",
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(limit: str, used: int, cpu: str = "max 100000", inactive: int = 0) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 5\ninactive_file {inactive}\n",
        "cpu.max": f"{cpu}\n",
    }


def below(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}{name}": text for name, text in files.items()}


def test_a_host_without_limits(tmp_path: Path) -> None:
    root = host(tmp_path, "0::/user.slice\n", V2.format(top="/"), below("user.slice/", v2("max", GIB)))
    assert available_memory(root) == (64 * GIB, "")
    assert cpu_quota(root) == NO_QUOTA


def test_the_narrowest_group_above_counts(tmp_path: Path) -> None:
    """B23: nested groups of version 2; not the root's files, which a host does not have."""
    files = below("a/", v2("3000000000", 2_000_000_000, "150000 100000")) | below("a/b/", v2("max", 1_000_000_000))
    files |= below("a/b/c/", v2("5000000000", 500_000_000, "400000 100000"))
    files |= below("other/", v2("1000", 0, "1000 100000"))
    root = host(tmp_path, "0::/a/b/c\n", V2.format(top="/"), files)
    left, limit = available_memory(root)
    assert left == 1_000_000_000
    assert limit.endswith("sys/fs/cgroup/a")
    assert cpu_quota(root).cores == 1.5


def test_inside_of_a_container(tmp_path: Path) -> None:
    """B23: the group's own name space, where the mount's top is the container's group."""
    for cgroup, top in (("0::/\n", "/"), ("0::/docker/x\n", "/docker/x"), ("0::/../up\n", "/elsewhere")):
        root = host(tmp_path, cgroup, V2.format(top=top), v2("2000000000", 1_500_000_000, "50000 100000", 300_000_000))
        assert available_memory(root)[0] == 800_000_000, "pages of files that nobody uses are given up first"
        assert cpu_quota(root).cores == 0.5


def test_version_1(tmp_path: Path) -> None:
    """B23: two hierarchies, each with its own path."""
    files = {
        "memory/docker/x/memory.limit_in_bytes": "1200000000\n",
        "memory/docker/x/memory.usage_in_bytes": "200000000\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "5000000000\n",
        "cpu,cpuacct/docker/cpu.cfs_quota_us": "300000\n",
        "cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/docker/x/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n",
    }
    root = host(tmp_path, "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/\n", V1.format(top="/"), files)
    assert available_memory(root)[0] == 1_000_000_000
    assert cpu_quota(root).cores == 3.0


@pytest.mark.parametrize("broken", ["", "nonsense", "0::/a\n"])
def test_what_cannot_be_read_limits_nothing(tmp_path: Path, broken: str) -> None:
    """B23: no /proc, other formats, files that are not there."""
    assert available_memory(tmp_path / "nowhere") == (2**63, "")
    if broken != "nonsense":
        root = host(tmp_path, broken, V2.format(top="/"), {"a/memory.max": "lots\n", "a/cpu.max": "\n"})
        assert available_memory(root) == (64 * GIB, "")
        assert cpu_quota(root) == NO_QUOTA


def test_cores() -> None:
    """B23: a part of a core is none to count on, and one there is always."""
    assert [whole_cores(8, quota) for quota in (math.inf, 9.0, 3.0, 2.5, 0.5)] == [8, 8, 3, 2, 1]
    assert 1 <= usable_cores() <= len(own_cores())
