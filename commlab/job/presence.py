"""Which ranks of this host have come to ``init``: told without MPI, before the ranks are connected.

A rank that has come binds a local socket in the kernel's own name space, whose name says which launch and which rank it
is. Nothing is sent there, nothing is left behind, and who can't bind the name again knows that the rank has come.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from .launch import RANK_VARIABLES, Launch


def launch_process(launch: Launch) -> int:
    """The process that started all ranks of this host: this one's nearest ancestor that is no rank itself. Several
    ranks that a shell wrapper has started find the same one."""
    variable = RANK_VARIABLES.get(launch.launcher or "", "").encode() + b"="
    pid = os.getppid()
    with suppress(OSError, ValueError, IndexError):
        while pid > 1:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if not any(word.startswith(variable) for word in words):
                break
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return pid


class Presence:
    """This rank has come, until :meth:`close`."""

    def __init__(self, launch: Launch):
        self._parent = launch_process(launch)
        # Open MPI may number a host's ranks in another order than the job's: where both counts are the same, only the
        # job's numbers are the ones that users know.
        self._all_here = launch.local_size == launch.size
        self._number = launch.rank if self._all_here else launch.local_rank
        self._numbers = launch.local_size
        self._socket: socket.socket | None = None
        with suppress(OSError, AttributeError):
            own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            own.bind(f"\0{self.name(self._number)}")
            self._socket = own

    def name(self, number: int) -> str:
        return f"commlab-init-{os.getuid()}-{self._parent}-{number}"

    def peers(self) -> list[tuple[str, str]]:
        """(socket name, words for messages) of the other ranks of this host. A rank is named by its number in the job
        where all ranks are on this host, else by its number on the host."""
        word = "rank" if self._all_here else "local rank"
        others = (number for number in range(self._numbers) if number != self._number)
        return [(self.name(number), f"{word} {number}") for number in others]

    def missing(self) -> list[str]:
        """The ranks of this host that have not come."""
        found = []
        for name, words in self.peers():
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe, suppress(OSError):
                probe.bind(f"\0{name}")
                found.append(words)
        return found

    def close(self) -> None:
        """Take the sign away."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
