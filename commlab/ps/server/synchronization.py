"""What a server asks of its synchronization."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from ..frames import Entry
from ..messages import Header
from .shard import OwnedSpan


class Synchronization(Protocol):
    """How the workers' pushes become updates, and who waits for whom. The ledger already has the new clock when
    :meth:`end_clock` is called, and knows who has left when :meth:`leave` is called."""

    def memory_for(self, worker: int, header: Header) -> torch.Tensor | None:
        """Memory (bytes) for the numbers of a push, or None while the push can't be taken in."""

    def take(self, worker: int, header: Header, data: torch.Tensor) -> str:
        """Take in a push. Returns why the push is refused; empty if it is not."""

    def ready(self, worker: int, header: Header, entries: Sequence[Entry]) -> bool:
        """Whether a frame of pushes can be taken in now, or will be refused."""

    def against(self, worker: int, header: Header) -> str:
        """Why slices ``header.key ..`` of a frame of pushes are refused; empty if they are not."""

    def take_span(self, worker: int, header: Header, span: OwnedSpan, numbers: torch.Tensor | None) -> None:
        """Take in slices of a frame that adjoin, with their numbers, which may be overwritten after
        :meth:`end_frame`; None: the worker has no gradient."""

    def end_frame(self, worker: int, header: Header) -> None:
        """Make the updates that the spans of a frame allow."""

    def read(self, worker: int, header: Header, entries: Iterable[Entry]) -> None:
        """Answer each entry of a read as soon as the consistency allows."""

    def end_clock(self, worker: int, header: Header) -> None:
        """Answer a worker that has ended its clock, and go on with what waited for the clock's end."""

    def leave(self) -> None:
        """Go on with, or refuse, what waited for a worker that has left."""

    def take_verdict(self, server: int, header: Header) -> None:
        """Take in what another server has found out about its share of a clock's gradient."""
