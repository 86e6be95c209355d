"""Memory without a name that other processes can map: made, sealed, mapped, and refused in words where it can't be had.

A memfd can be opened by any process of the same user, through /proc. So it is sealed: nobody can cut it off under those
who have it mapped, which would be a SIGBUS. And what a peer says of itself is looked at before it is opened: the same
numbers may be a stranger's, in another PID namespace or after a process has ended.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..errors import SharedMemoryError
from ..job.limits import available_memory
from ..native import library

_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 2) | getattr(fcntl, "F_SEAL_GROW", 4) | getattr(fcntl, "F_SEAL_SEAL", 1)
_GET_SEALS, _ADD_SEALS = getattr(fcntl, "F_GET_SEALS", 1034), getattr(fcntl, "F_ADD_SEALS", 1033)
_FROM_MEMORY: Any = ctypes.pythonapi.PyMemoryView_FromMemory
_FROM_MEMORY.restype, _FROM_MEMORY.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_PIECE_BYTES = 64 * 2**20
_SMALL_BYTES = 2**20
"""Up to this size nobody asks first: a process takes as much in passing, and to ask costs half a millisecond."""
_WRITABLE = 0x200  # PyBUF_WRITE


class Mapping:
    """A memfd as this process sees it. The memory stays mapped for as long as this object or a tensor of it lives, and
    holds no descriptor."""

    def __init__(self, fd: int, size_bytes: int):
        """Raises OSError."""
        native: Any = library.built
        self.address, self.size_bytes = int(native.map_shared(fd, size_bytes)), size_bytes
        # Not at exit: tensors may be used until the process ends.
        weakref.finalize(self, native.unmap, self.address, size_bytes).atexit = False

    def tensor(self, offset: int, size_bytes: int, dropped: Callable[[], object] | None = None) -> torch.Tensor:
        """A part as a 1-D uint8 tensor with a storage of its own, which keeps the memory mapped. ``dropped()``: called
        once nobody has the storage any more."""
        if not size_bytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        view = _FROM_MEMORY(self.address + offset, size_bytes, _WRITABLE)
        # The storage keeps the view, and the view's end lets go of the mapping.
        weakref.finalize(view, _let_go, self, dropped).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)

    @property
    def bytes(self) -> torch.Tensor:
        """All of it."""
        return self.tensor(0, self.size_bytes)


def _let_go(mapping: Mapping, dropped: Callable[[], object] | None) -> None:
    # The mapping has been kept until now.
    if dropped is not None:
        dropped()


def memfd(owner: str, name: str, size_bytes: int) -> int:
    """A new one, all of it allocated, of a size that nobody can change; its name begins with ``owner``. Raises
    SharedMemoryError where the memory is missing, OSError."""
    if size_bytes > _SMALL_BYTES:
        require_memory(size_bytes, name)
    fd = os.memfd_create(f"commlab {owner} {name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Truncating alone would promise memory; the first touch of a page that is not there is a SIGBUS. Not all of it
        # at once, because other ranks take theirs at this moment, and have seen the same memory free.
        for start in range(0, size_bytes, _PIECE_BYTES):
            if start:
                require_memory(size_bytes, name, size_bytes - start)
            os.posix_fallocate(fd, start, min(_PIECE_BYTES, size_bytes - start))
        fcntl.fcntl(fd, _ADD_SEALS, _SEALS)
    except (OSError, SharedMemoryError):
        os.close(fd)
        raise
    return fd


def require_memory(size_bytes: int, name: str, missing_bytes: int | None = None) -> None:
    """SharedMemoryError where there is no memory for ``size_bytes``, or for those of them that are still missing."""
    # The kernel would rather kill a process, anybody's, than refuse.
    available, limit = available_memory()
    if (size_bytes if missing_bytes is None else missing_bytes) > available:
        raise SharedMemoryError(
            f"no {size_bytes / 2**20:.0f} MiB of shared memory for {name}: {available / 2**20:.0f} MiB are left"
            f"{f' ({limit})' if limit else ''}; ask for less, or give the job more memory"
        )


def close_all(fds: list[int]) -> None:
    """Close these descriptors, and forget them."""
    while fds:
        os.close(fds.pop())


def opened(pid: int, fd: int, size_bytes: int, what: str, name: str = "") -> int:
    """A descriptor of another process, opened for reading, once it is known to be a sealed memfd of commlab. ``name``:
    how its name goes on after ``commlab``. Raises SharedMemoryError; ``what`` is for its message."""
    path = f"/proc/{pid}/fd/{fd}"
    try:
        # Looked at before it is opened: to open a device or a pipe may do something.
        link, found = os.readlink(path), os.stat(path)
        if not stat.S_ISREG(found.st_mode) or not link.startswith("/memfd:commlab "):
            raise SharedMemoryError(f"{what} of process {pid} is {link!r}, and no memory of commlab")
        mine = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SharedMemoryError(f"cannot open {what} of process {pid}: {error.strerror}") from error
    try:
        # Of what has been opened now, because the number may mean something else by this time.
        found, link = os.fstat(mine), os.readlink(f"/proc/self/fd/{mine}")
        if not link.startswith(f"/memfd:commlab {name}"):
            raise SharedMemoryError(f"{what} of process {pid} is {link!r}, another window's memory")
        if found.st_size != size_bytes:
            raise SharedMemoryError(f"{what} of process {pid} has {found.st_size} bytes, not {size_bytes}")
        if fcntl.fcntl(mine, _GET_SEALS) & _SEALS != _SEALS:
            raise SharedMemoryError(f"{what} of process {pid} can still change its size")
    except (OSError, SharedMemoryError) as error:
        os.close(mine)
        if isinstance(error, SharedMemoryError):
            raise
        raise SharedMemoryError(f"cannot open {what} of process {pid}: {error.strerror}") from error
    return mine


def mapped(mine: int, size_bytes: int, what: str) -> Mapping:
    """Map what :func:`opened` has opened, and close it. Raises SharedMemoryError."""
    try:
        writable = os.open(f"/proc/self/fd/{mine}", os.O_RDWR | os.O_CLOEXEC)
        try:
            return Mapping(writable, size_bytes)
        finally:
            os.close(writable)
    except OSError as error:
        raise SharedMemoryError(f"cannot map {what}: {error.strerror}") from error
    finally:
        os.close(mine)
