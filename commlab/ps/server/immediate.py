"""SSP and ASP on a server: every push is an update of its own, made when it arrives.

A value contains of every worker the clocks that the worker has ended, so the slowest worker that is still there decides
who may read. Waiting reads are tried again whenever a worker ends a clock or leaves. The bits depend on who was first.
"""

from __future__ import annotations

import torch

from ...errors import CommlabError
from ..messages import Header
from .ledger import Ledger, Waiting
from .reads import Reads

_CLOCK_ENDED = 0
"""The one event that reads wait for."""


class Immediate:
    """The synchronization of :class:`commlab.ps.server.server.Server` under SSP and ASP."""

    def __init__(self, ledger: Ledger, reads: Reads):
        self._ledger, self._reads = ledger, reads

    def memory_for(self, worker: int, header: Header) -> torch.Tensor:
        """Memory for the numbers of a push: they are used as soon as they are there."""
        return self._ledger.scratch(worker, header.length)

    def take(self, worker: int, header: Header, data: torch.Tensor) -> str:
        """Make an update of a push. Returns why the push is refused; empty if the update was made."""
        reason = self._ledger.against_push(worker, header)
        if reason:
            return reason
        assert header.dtype is not None
        shard, hypers = self._ledger.shard, self._ledger.workers[worker].hypers
        slices = range(header.key, header.key + header.slices)
        lengths = [shard.slices[index].numel for index in slices]
        numbers = dict(zip(slices, data.view(header.dtype).split(lengths), strict=True))
        factor = 1 / hypers.scale
        shard.update(numbers, hypers.groups, factor)
        self._ledger.record(slices, [(worker, header.clock, header.sequence)], hypers, factor)
        return ""

    def read(self, waiting: Waiting) -> None:
        """Answer a read now, or when enough workers have ended a clock."""
        clocks = (worker.clock for worker in self._ledger.workers if not worker.left)
        self._reads.read(waiting, min(clocks, default=waiting.header.clock), _CLOCK_ENDED)

    def end_clock(self, worker: int, header: Header) -> None:
        """A worker has ended clock ``header.clock``."""
        self._ledger.acknowledge(worker, header)
        self._read_again()

    def leave(self) -> None:
        """A worker has left."""
        self._read_again()

    def take_verdict(self, server: int, header: Header) -> None:
        """No server has a verdict to send, because none waits for the others."""
        raise CommlabError(f"server {server} sent {header.kind.name} of clock {header.clock}, which only bsp has")

    def _read_again(self) -> None:
        for waiting in self._reads.take(_CLOCK_ENDED):
            self.read(waiting)
