"""SSP and ASP on a server: every push is an update of its own, made when it arrives.

A value contains of every worker the clocks that the worker has ended, so the slowest worker that is still there decides
who may read. Waiting reads are tried again whenever a worker ends a clock or leaves. The bits depend on who was first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...errors import CommlabError
from ..frames import Entry
from ..messages import NO_WIRE, Header
from .ledger import Ledger
from .reads import Reads
from .shard import OwnedSpan

_CLOCK_ENDED = 0
"""The one event that reads wait for."""


class Immediate:
    """The synchronization of :class:`commlab.ps.server.server.Server` under SSP and ASP."""

    def __init__(self, ledger: Ledger, reads: Reads):
        self._ledger, self._reads = ledger, reads
        self._taken: list[tuple[OwnedSpan, torch.Tensor]] = []
        """What the frame that is being taken in has."""
        self._slowest: int | None = 0
        """The least clock of the workers that are still there; None: all have left."""

    def memory_for(self, worker: int, header: Header) -> torch.Tensor:
        """Memory for the numbers of a push: they are used as soon as they are there."""
        return self._ledger.scratch(worker, header.length)

    def take(self, worker: int, header: Header, data: torch.Tensor) -> str:
        """Make an update of a push. Returns why the push is refused; empty if the update was made."""
        reason = self._ledger.against_push(worker, header)
        if not reason:
            assert header.dtype is not None
            slices = range(header.key, header.key + header.slices)
            self._update(worker, header, [(span, data.view(header.dtype)) for span in self._ledger.shard.spans(slices)])
        return reason

    def ready(self, worker: int, header: Header, entries: Sequence[Entry]) -> bool:
        """A frame of pushes is taken in at once."""
        return True

    def take_span(self, worker: int, header: Header, span: OwnedSpan, numbers: torch.Tensor | None) -> None:
        """Note one span of a frame of pushes."""
        assert numbers is not None
        self._taken.append((span, numbers))

    def end_frame(self, worker: int, header: Header) -> None:
        """Make one update of the spans of a frame."""
        taken, self._taken = self._taken, []
        if taken:
            self._update(worker, header, taken)

    def against(self, worker: int, header: Header) -> str:
        """Why a span of a frame can't be taken in; empty if it can."""
        return self._ledger.against_push(worker, header, sized=False) or (
            "only bsp has pushes without numbers" if header.wire == NO_WIRE else ""
        )

    def _update(self, worker: int, header: Header, gradients: Sequence[tuple[OwnedSpan, torch.Tensor]]) -> None:
        hypers = self._ledger.workers[worker].hypers
        factor = 1 / hypers.scale
        self._ledger.shard.update(gradients, hypers.groups, factor)
        slices = [index for span, _ in gradients for index in span.indices]
        self._ledger.record(slices, [(worker, header.clock, header.sequence)], hypers, factor)

    def read(self, worker: int, header: Header, entries: Iterable[Entry]) -> None:
        """Answer reads now, or when enough workers have ended a clock."""
        for entry in entries:
            self._read(worker, header, entry, self._ledger.now_s)

    def _read(self, worker: int, header: Header, entry: Entry, since_s: float) -> None:
        slowest = self._slowest
        self._reads.read(worker, header, entry, since_s, header.clock if slowest is None else slowest, _CLOCK_ENDED)

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
        clocks = (worker.clock for worker in self._ledger.workers if not worker.left)
        self._slowest = min(clocks, default=None)
        for waiting in self._reads.take((_CLOCK_ENDED,)):
            self._read(waiting.worker, waiting.header, (waiting.first, waiting.slices), waiting.since_s)
