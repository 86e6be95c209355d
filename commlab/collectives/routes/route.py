"""What a module of this folder has to offer."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ...runtime.group import Group
from ...transport.base import AtOnce, Offload, Pending, Piggyback
from ...window.exchange import Attachment
from ..plan import Call


class Route(Protocol):
    """What a module of :mod:`.routes` offers: a way by which numbers travel between the ranks of a group.

    The three operations are computations that run once all ranks are known to agree on the call; they work in place on
    ``call.flat``. A route without the halves says so in :meth:`reason_against`. One that does a whole operation in
    native code also has ``prepared(group, kind, dtype, wire, numel, op, chunks)``, kept in the plan as ``shared``, and
    ``at_once(shared)``, the operation as one native call, or None.
    """

    CASTS: bool
    """Whether the route casts fp32 numbers to a 16-bit wire by itself; else it is given numbers in the wire's dtype."""

    LAUNCHES: bool
    """Whether :meth:`attach` gives a transport that moves itself the whole operation; False where it is missing."""

    def reason_against(self, group: Group, kind: str) -> str:
        """Why ``group`` can't do an operation of ``kind`` by this route; empty if it can. ``kind``: allreduce,
        reduce_scatter, allgather; reduce and broadcast where one rank owns everything."""

    def attach(self, call: Call) -> Attachment | Piggyback | Offload:
        """What this rank tells the others with its record of the agreement check."""

    def allreduce(self, call: Call) -> Pending:
        """Reduce the whole buffer on all ranks."""

    def reduce_chunks(self, call: Call) -> Pending:
        """Reduce rank r's chunk on rank r, for all r, into ``call.wide`` where that is given."""

    def gather_chunks(self, call: Call) -> Pending:
        """Bring rank r's chunk to all ranks, for all r."""


class FewRoute(Protocol):
    """A route for an allreduce of few numbers, which travel in the same exchange as the agreement check."""

    CASTS: bool
    """As of a :class:`Route`."""

    def load_of(self, group: Group, numel: int, wire: torch.dtype, op: str) -> Any:
        """What is worth keeping of an allreduce of ``numel`` numbers; None where these numbers can't travel so."""

    def at_once(self, group: Group, few: Any, numel: int, wire: torch.dtype, op: str) -> AtOnce | None:
        """The operation as one native call; None where it takes more. ``few``: what :meth:`load_of` has found."""

    def attach(self, call: Call) -> Attachment | Piggyback | Offload:
        """What this rank tells the others with its record: its numbers."""

    def allreduce(self, call: Call) -> Pending:
        """Reduce the whole buffer on all ranks, once the exchange has brought everybody's numbers."""
