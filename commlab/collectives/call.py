"""One operation on one rank as its route sees it, and what a route has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..chunks import Range
from ..native.norm import Squares
from ..runtime.agreement import Signature
from ..runtime.group import Group
from ..runtime.operand import divided
from ..transport.base import Pending, Piggyback
from ..window.exchange import Attachment
from .staging import as_flat, put_back


class Plan(NamedTuple):
    """What follows from the arguments of a call alone, and need not be worked out when the call is made again."""

    chosen: str
    """The algorithm by the name that a caller may give; equal on all ranks."""
    route: Any
    """The module of :mod:`.routes` that moves the numbers; a :class:`Route`, or a :class:`FewRoute`."""
    wire: torch.dtype
    """The dtype in which the numbers travel."""
    signature: Signature
    """What ranks must agree on."""
    few: Any = None
    """What a :class:`FewRoute` has worked out for a call of this shape."""


class Call:
    """The ``op`` of ``plan`` on ``tensor``, on this rank of ``group``. ``chunks``: one per rank, for the two halves of
    an allreduce. ``wide``: where a reduction leaves its fp32 sums of 16-bit numbers. ``squares``: is given the sum of
    squares of the numbers that this rank reduces, where they are at hand, on all ranks or none."""

    __slots__ = ("_flat", "chunks", "divisor", "group", "op", "piggyback", "plan", "squares", "tensor", "wide")

    def __init__(
        self,
        group: Group,
        plan: Plan,
        tensor: torch.Tensor,
        op: str,
        chunks: Sequence[Range] = (),
        squares: Squares | None = None,
        wide: torch.Tensor | None = None,
    ):
        self.group, self.plan, self.tensor = group, plan, tensor
        self.divisor, self.op = divided(op, group.size)
        self.chunks, self.squares, self.wide = chunks, squares, wide
        self.piggyback: Piggyback | None = None
        """What travels with this rank's record, once the route has loaded it."""
        self._flat: torch.Tensor | None = None

    @property
    def flat(self) -> torch.Tensor:
        """The numbers as a flat CPU buffer in the dtype that the route wants: the tensor itself where it is one
        already, else a copy, made when it is first asked for."""
        if self._flat is None:
            casts = self.plan.route.CASTS and self.tensor.dtype is torch.float32
            self._flat = as_flat(self.tensor, self.tensor.dtype if casts else self.plan.wire)
        return self._flat

    def put_back(self) -> None:
        """Write the flat buffer back to the tensor, where the buffer is a copy."""
        put_back(self.flat, self.tensor)


class Route(Protocol):
    """What a module of :mod:`.routes` offers: a way by which numbers travel between the ranks of a group.

    The three operations are computations that run once all ranks are known to agree on the call; they work in place on
    ``call.flat``. A route that has no halves raises UsageError from :meth:`reason_against`.
    """

    CASTS: bool
    """Whether the route casts fp32 numbers to a 16-bit wire by itself; else it is given numbers in the wire's dtype."""

    def reason_against(self, group: Group, kind: str) -> str:
        """Why ``group`` can't do an operation of ``kind`` by this route; empty if it can. ``kind``: allreduce,
        reduce_scatter, allgather; reduce and broadcast where one rank owns everything."""

    def attach(self, call: Call) -> Attachment | Piggyback:
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

    def attach(self, call: Call) -> Attachment | Piggyback:
        """What this rank tells the others with its record: its numbers."""

    def allreduce(self, call: Call) -> Pending:
        """Reduce the whole buffer on all ranks, once the exchange has brought everybody's numbers."""
