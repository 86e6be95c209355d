"""Memory without a name that other processes can map: made, mapped, and refused in words where it can't be had."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import torch

from ..errors import CommlabError


class Unavailable(CommlabError):
    """Why these ranks can't have a window; they use point-to-point then."""


class Mapping:
    """A memfd as this process sees it."""

    def __init__(self, fd: int, size_bytes: int):
        self.memory = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.address, self.size_bytes = self.bytes.data_ptr(), size_bytes


def _available_bytes() -> int:
    """Memory that can be had without pushing anybody out, as the kernel and this process's cgroup say."""
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        used, most = (int(Path(f"/sys/fs/cgroup/memory.{what}").read_text()) for what in ("current", "max"))
        limits.append(most - used)
    return min(limits, default=2**63)


def memfd(name: str, size_bytes: int) -> int:
    """A new one, all of it allocated. Raises Unavailable where the memory is missing, OSError."""
    # The kernel would rather kill a process, anybody's, than refuse.
    available = _available_bytes()
    if size_bytes > available:
        raise Unavailable(
            f"no {size_bytes / 2**20:.0f} MiB of shared memory for {name}: {available / 2**20:.0f} MiB are left"
        )
    fd = os.memfd_create(f"commlab {name}", os.MFD_CLOEXEC)
    try:
        # Truncating alone would promise memory; the first touch of a page that is not there is a SIGBUS.
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def close_all(fds: list[int]) -> None:
    """Close these descriptors, and forget them."""
    while fds:
        os.close(fds.pop())


def mapped(pid: int, fd: int, size_bytes: int, what: str) -> Mapping:
    """A descriptor of another process, as this process sees it. Raises Unavailable; ``what`` is for its message."""
    try:
        opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"cannot open {what} of process {pid}: {error.strerror}") from error
    try:
        if os.fstat(opened).st_size != size_bytes:
            raise Unavailable(f"{what} of process {pid} has {os.fstat(opened).st_size} bytes, not {size_bytes}")
        return Mapping(opened, size_bytes)
    except (OSError, ValueError) as error:
        raise Unavailable(f"cannot map {what} of process {pid}: {error}") from error
    finally:
        os.close(opened)
