"""One writer for a folder of checkpoints, or of a model: a lock that ends with the process that has it, in any way.

The lock is a POSIX record lock on the file ``.writer``, not flock: worker processes that were forked do not inherit it,
so that a program killed with workers can be started again at once, and NFS passes it to its server, so that it holds
between hosts. A process does not exclude itself by it: what it writes by itself is listed here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import weakref
from pathlib import Path

from ..errors import UsageError

log = logging.getLogger("commlab")

NAME = ".writer"
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_here: dict[str, tuple[int, weakref.ref[Writer]]] = {}
"""By folder: the process that writes there (this one, or its parent before a fork), and through what."""


class Writer:
    """The right to write checkpoints, or ``what`` else is named in errors, into ``folder``, which exists. UsageError,
    which names host and process, where another program or another object of this process has it. It lasts until
    :meth:`close`, or until nobody has the object any longer."""

    def __init__(self, folder: Path, what: str = ""):
        self.folder, self._key = folder, str(folder.resolve())
        self._what = what or f"checkpoints in {folder}"
        process, other = _here.get(self._key, (0, None))
        if process == os.getpid() and other is not None and other() is not None:
            raise UsageError(
                f"{self._what}: another {'run' if what else 'Checkpoints object'} of this process (pid {process} on "
                f"{socket.gethostname()}) writes there; close() that one first, or give each a folder of its own"
            )
        self._file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self.locked = self._lock()
        except BaseException:
            os.close(self._file)
            raise
        _here[self._key] = os.getpid(), weakref.ref(self)
        self._release = weakref.finalize(self, _release, self._file, self._key, os.getpid())

    def _lock(self) -> bool:
        """Whether the file system has locks."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                log.warning("%s: its file system has no locks; keep other programs from writing there", self.folder)
                return False
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise UsageError(
                f"{self._what}: another program writes there ({_described(self._file)}); wait for its end, or give "
                "another folder"
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        return True

    def close(self) -> None:
        """Let others write."""
        self._release()


def _described(file: int) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        owner = json.loads(os.pread(file, 4096, 0))
        return f"pid {owner['pid']} on {owner['host']}"
    return "it has not yet said which"


def _release(file: int, key: str, process: int) -> None:
    if process == os.getpid():
        del _here[key]
    os.close(file)
