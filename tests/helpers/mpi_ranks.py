"""The groups of one launch of mpirun, and what its ranks tell each other about a test's end.

``tests/mpi/conftest.py`` makes one :class:`Ranks` in each process, and gives it to tests as the fixture ``ranks``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest

import commlab
from commlab.runtime import world
from commlab.runtime.group import Group

TIMEOUT_S = 60.0
"""How long a group waits for a rank that has failed; then the other ranks too learn how the test went."""

_MEETING, _VERDICT = b"m", b"v"
"""How what a rank says begins: whether it is in the middle of a test or at its end."""


class Ranks:
    """The groups of this launch: made when first asked for, and anew after a failure, which leaves ranks apart."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._verdicts = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self._verdicts.rank, self._verdicts.size
        self._groups: dict[tuple[int, ...], Group | None] = {}

    @property
    def world(self) -> Group:
        """All ranks: also the group of operations that are given none."""
        return commlab.init("mpi", timeout_s=TIMEOUT_S)

    def need(self, count: int) -> None:
        """Skip the test, on all ranks, where the launch has fewer than ``count``."""
        if self.size < count:
            pytest.skip(f"needs {count} ranks, and this launch has {self.size}: python tests/mpi/launch.py 8")

    def subgroup(self, ranks: Iterable[int]) -> Group | None:
        """A new group of these ranks; None on the others. Collective over all ranks; where the launch has not so many,
        the test is skipped."""
        members = tuple(ranks)
        self.need(max(members) + 1)
        return self.world.subgroup(members)

    def group(self, *ranks: int) -> Group | None:
        """The group of these ranks, kept for the next test; None on the others. Collective over all ranks."""
        if ranks not in self._groups:
            self._groups[ranks] = self.subgroup(ranks)
        return self._groups[ranks]

    def halves(self, first: int) -> Group:
        """This rank's group when the first ``first`` ranks and the others go separate ways."""
        first = min(first, self.size)
        parts = [ranks for ranks in (range(first), range(first, self.size)) if ranks]
        groups = [self.group(*ranks) for ranks in parts]
        return next(group for group in groups if group is not None)

    @property
    def splits(self) -> range:
        """The arguments for :meth:`halves` with which every number of ranks from 1 to all occurs, and no rank is ever
        idle."""
        return range(self.size // 2 + 1)

    def forget(self) -> None:
        """Make all groups anew when they are next asked for: a failure has left the ranks at different operations."""
        self._groups.clear()
        world._world = None

    def meet(self) -> None:
        """All ranks are here, in the middle of a test. Collective. Fails the test here where it has failed on others,
        which will not come."""
        if any(said.startswith(_VERDICT) for said in self._tell(_MEETING)):
            pytest.fail("other ranks have failed before they came here", pytrace=False)

    def verdicts(self, text: bytes) -> list[bytes]:
        """How a test went, on every rank: empty where well. Collective, at the test's end. Ranks that wait don't spin:
        they leave the cores to those that still work."""
        while True:
            everyones = self._tell(_VERDICT + text)
            # Who still wanted to meet learns of this verdict there, and comes to its own.
            if all(said.startswith(_VERDICT) for said in everyones):
                return [said.removeprefix(_VERDICT) for said in everyones]

    def _tell(self, text: bytes) -> list[bytes]:
        """Every rank's ``text`` on every rank. Collective."""
        sizes, mine = bytearray(8 * self.size), len(text).to_bytes(8, "little")
        self._patiently(self._verdicts.Iallgather([mine, self._mpi.BYTE], [sizes, self._mpi.BYTE]))
        widest = max(int.from_bytes(sizes[at : at + 8], "little") for at in range(0, 8 * self.size, 8))
        texts = bytearray(widest * self.size)
        padded = text.ljust(widest, b"\0")
        self._patiently(self._verdicts.Iallgather([padded, self._mpi.BYTE], [texts, self._mpi.BYTE]))
        return [bytes(texts[at : at + widest]).rstrip(b"\0") for at in range(0, widest * self.size, widest)]

    @staticmethod
    def _patiently(request: Any) -> None:
        pause_s = 2e-5
        while not request.Test():
            time.sleep(pause_s)
            pause_s = min(5e-3, 1.2 * pause_s)
