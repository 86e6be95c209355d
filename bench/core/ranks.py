"""The ranks of a benchmark, as the harness needs them: connected over MPI, beside the commlab group that is
measured."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from commlab.job import launch
from commlab.job.topology import usable_cores


def link_bytes_per_s() -> float:
    """How much each emulated host's link carries each way, as bench.cluster made the link; 0 elsewhere."""
    return float(os.environ.get("COMMLAB_LINK_BYTES_PER_S", 0))


def share_cores(threads: int | None = None) -> None:
    """Give torch the threads that a training process gives it: all cores, shared among the ranks of this host. Emulated
    hosts share this machine's cores, though each of them sees all. ``threads`` or OMP_NUM_THREADS: so many instead."""
    import torch

    here = launch.detect()
    sharing = here.size if link_bytes_per_s() else here.local_size
    wanted = threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
    torch.set_num_threads(wanted or max(1, usable_cores() // sharing))


class Ranks:
    """All ranks of the launch; one rank without a launcher, which then needs no MPI."""

    def __init__(self) -> None:
        self._comm: Any = None
        self.rank, self.size, self.mpi = 0, 1, "none"
        if launch.detect().launcher is not None:
            from mpi4py import MPI

            from commlab.transport.mpi import library

            self._comm = MPI.COMM_WORLD.Dup()
            self.rank, self.size, self.mpi = self._comm.rank, self._comm.size, library()

    def barrier(self) -> None:
        if self._comm is not None:
            self._comm.Barrier()

    def rest(self) -> None:
        """A barrier that leaves the core to others; late by up to 2 ms. Collective."""
        if self._comm is not None:
            request = self._comm.Ibarrier()
            while not request.Test():
                time.sleep(2e-3)

    def maximum(self, values: Sequence[float]) -> list[float]:
        """The largest values over all ranks, element by element. Collective; as many values on every rank."""
        return self._reduced(values, "MAX")

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, element by element. Collective; as many values on every rank."""
        return self._reduced(values, "SUM")

    def _reduced(self, values: Sequence[float], op: str) -> list[float]:
        mine = np.asarray(values, np.float64)
        if self._comm is None:
            return list(map(float, mine))
        from mpi4py import MPI

        everyone = np.empty_like(mine)
        self._comm.Allreduce(mine, everyone, getattr(MPI, op))
        return list(map(float, everyone))

    def first(self, text: str) -> str:
        """The text of the lowest rank whose text is not empty; empty when all are. Collective."""
        if self._comm is None:
            return text
        width = int(self.maximum([len(text.encode())])[0])
        if not width:
            return ""
        mine = np.frombuffer(text.encode().ljust(width, b"\0"), np.uint8)
        table = np.empty((self.size, width), np.uint8)
        self._comm.Allgather(mine, table)
        texts = (row.tobytes().rstrip(b"\0").decode() for row in table)
        return next(filter(None, texts), "")
