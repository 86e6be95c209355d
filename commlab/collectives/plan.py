"""A call and its plan. The plan is what follows from the arguments alone, worked out once for each shape of call:
whether the call can be made, by which route, on which wire, and the signature that all ranks must agree on. The call is
one operation on one rank, as its route sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from ..chunks import Range
from ..errors import UsageError
from ..native.dtypes import DTYPES, HALVES, MOVED, WIRES, require_wire
from ..native.norm import Squares
from ..runtime.agreement import Signature
from ..runtime.group import Group
from ..runtime.recording import refusal
from ..transport.base import AtOnce, Offload, Piggyback
from . import routes
from .select import Conditions, choose
from .staging import as_flat, put_back
from .tensors import described, readable

Chunks: TypeAlias = Sequence[Range]
"""One range of the numbers per rank."""

OPS = ("sum", "mean", "min", "max", "prod")


def require(group: Group, kind: str, tensor: torch.Tensor, op: str = "sum", wire: str | None = None) -> None:
    """UsageError for what no rank could do; what only differs between ranks is found by the agreement check."""
    where = where_of(group, kind, tensor)
    readable(tensor, where)
    if tensor.dtype not in (MOVED if kind == "allgather" else DTYPES):
        raise UsageError(
            f"{where}: dtypes are {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}; cast it"
        )
    if not isinstance(op, str) or op not in OPS:
        raise UsageError(f"{where}: unknown op {op!r}; there are {', '.join(OPS)}")
    if op == "mean" and not tensor.dtype.is_floating_point:
        raise UsageError(f"{where}: the mean of integers is not an integer; use op='sum' and divide, or a float tensor")
    require_wire(wire, f"{where}: ")
    if wire is not None and (not tensor.dtype.is_floating_point or op not in ("sum", "mean")):
        raise UsageError(f"{where}: a 16-bit wire is for sum and mean of floating-point tensors, not op={op!r}")


def where_of(group: Group, kind: str, tensor: object) -> str:
    """The words with which a message about one argument begins."""
    return f"rank {group.rank}: {kind} of {described(tensor)}"


def divided(op: str, size: int) -> tuple[int, str]:
    """What the reduced numbers of ``size`` ranks are divided by, and how they are reduced."""
    return (size, "sum") if op == "mean" else (1, op)


def pick(group: Group, kind: str, algorithm: str, numel: int, dtype: torch.dtype) -> tuple[str, str]:
    """The algorithm that an operation on ``numel`` numbers of ``dtype`` (the wire's) will use, and why. UsageError for
    one that this group can't."""
    against = {name: routes.load(row.file).reason_against(group, kind) for name, row in routes.ROUTES.items()}
    if against.get(algorithm):
        raise UsageError(f"rank {group.rank}: algorithm {algorithm} is not to be had: {against[algorithm]}")
    case = Conditions(
        kind,
        group.size,
        numel * dtype.itemsize,
        dtype in HALVES,
        group.transport.name,
        window=not against["window"],
        hierarchical=not against["hierarchical"],
        nodes=len(group.nodes),
        piggyback=kind == "allreduce" and routes.load("piggyback").load_of(group, numel, dtype, "sum") is not None,
    )
    return choose(algorithm, case, routes.names())


def given_as(route: Any, dtype: torch.dtype, wire: torch.dtype) -> torch.dtype:
    """In which dtype ``route`` is given the numbers of a tensor of ``dtype`` that travel as ``wire``."""
    return dtype if route.CASTS and dtype is torch.float32 else wire


class Plan(NamedTuple):
    """What follows from the arguments of a call alone, and need not be worked out when the call is made again."""

    chosen: str
    """The algorithm by the name that a caller may give; equal on all ranks."""
    route: Any
    """The module of :mod:`.routes` that moves the numbers: a :class:`.routes.route.Route`, or a ``FewRoute``."""
    wire: torch.dtype
    """The dtype in which the numbers travel."""
    signature: Signature
    """What ranks must agree on."""
    few: Any = None
    """What a route for few numbers has worked out for a call of this shape."""
    shared: Any = None
    """The operation as native code does it in memory that the ranks share
    (:class:`commlab.window.loops.Collective`)."""
    at_once: AtOnce | None = None
    """The call as one native call, where its route has such."""

    def launches(self, group: Group) -> bool:
        """Whether the transport moves the whole operation by itself, from the moment that the operation is called."""
        return group.transport.moves_itself and group.window is None and getattr(self.route, "LAUNCHES", False)


class Call:
    """The ``op`` of ``plan`` on ``tensor``, on this rank of ``group``. ``chunks``: one per rank, for the two halves of
    an allreduce. ``wide``: where a reduction leaves its fp32 sums of 16-bit numbers. ``squares``: is given the sum of
    squares of the numbers that this rank reduces, where they are at hand, on all ranks or none."""

    __slots__ = (
        "_flat", "awaited", "chunks", "divisor", "group", "inner", "launch", "op", "operation", "piggyback",
        "plan", "squares", "tensor", "wide",
    )  # fmt: skip

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
        self.operation = op
        """As the caller has named it; :attr:`op` is what is done to the numbers before :attr:`divisor`."""
        self.divisor, self.op = divided(op, group.size)
        self.chunks, self.squares, self.wide = chunks, squares, wide
        self.piggyback: Piggyback | None = None
        """What travels with this rank's record, once the route has loaded it."""
        self.awaited = False
        """The caller goes on to wait for it."""
        self.launch: Offload | None = None
        """The operation as the transport moves it by itself, once the route has made it."""
        self.inner: Call | None = None
        """What a route makes of the operation, where that is another one."""
        # The halves are given flat buffers.
        self._flat: torch.Tensor | None = tensor if chunks else None

    @property
    def flat(self) -> torch.Tensor:
        """The numbers as a flat CPU buffer in the dtype that the route wants: the tensor itself where it is one
        already, else a copy, made when it is first asked for."""
        if self._flat is None:
            self._flat = as_flat(self.tensor, given_as(self.plan.route, self.tensor.dtype, self.plan.wire))
        return self._flat

    def put_back(self) -> None:
        """Write the flat buffer back to the tensor, where the buffer is a copy."""
        if self._flat is not None and self._flat is not self.tensor:
            put_back(self._flat, self.tensor)


def plan_of(
    group: Group,
    kind: str,
    tensor: torch.Tensor,
    op: str,
    name: str | None,
    algorithm: str,
    wire: str | None = None,
    chunks: Sequence[Range] | None = None,
    meaning: str = "",
) -> Plan:
    """The plan of a call: worked out once for each shape of call, then looked up. ``meaning``: what ranks must agree on
    of numbers that are only moved. UsageError for what can't be."""
    try:
        key = (kind, tensor.shape, tensor.dtype, op, name, algorithm, wire, chunks, meaning)
        found = group.plans.get(key)
    except (AttributeError, RuntimeError, TypeError) as error:
        where = where_of(group, kind, tensor)
        readable(tensor, where)
        raise UsageError(f"{where}: op, name, algorithm and wire must be text ({error})") from error
    if found is None:
        if by := group.recorder():  # sizes are no numbers then
            raise refusal(group.rank, kind, by)
        require(group, kind, tensor, op, wire)
        if not isinstance(name, str | None) or not isinstance(algorithm, str):
            raise UsageError(
                f"{where_of(group, kind, tensor)}: name and algorithm must be text, not {name!r} and {algorithm!r}"
            )
        rooted = chunks is not None and any(chunk.numel == tensor.numel() for chunk in chunks)
        case_kind = {"reduce_scatter": "reduce", "allgather": "broadcast"}.get(kind, kind) if rooted else kind
        wire_dtype = WIRES[wire] or tensor.dtype
        chosen, _ = pick(group, case_kind, algorithm, tensor.numel(), wire_dtype)
        detail = f"{op}, {chosen}, wire {wire or 'as is'}"
        if chunks is not None and len(chunks) > 1:
            detail += f", chunks to {[chunk.stop for chunk in chunks]}"
        if meaning:
            detail += f", {meaning}"
        row = routes.row_of(chosen)
        route, few, at_once = routes.load(row.file), None, None
        if row.few and kind == "allreduce":
            few_route = routes.load(row.few)
            few = few_route.load_of(group, tensor.numel(), wire_dtype, op)
            if few is not None:
                route, at_once = few_route, few_route.at_once(group, few, tensor.numel(), wire_dtype, op)
        if row.halves and kind != "allreduce" and algorithm == "auto":
            whole = routes.load(row.halves)
            few = whole.load_of(group, kind, tensor.numel(), tensor.dtype)
            if few is not None:
                route, at_once = whole, whole.at_once(group, few, op)
        shared = None
        if few is None and tensor.numel() and hasattr(route, "prepared"):
            given = given_as(route, tensor.dtype, wire_dtype)
            shared = route.prepared(group, kind, given, wire_dtype, tensor.numel(), op, chunks)
            at_once = route.at_once(shared)
        signature = Signature(kind, tuple(tensor.shape), tensor.dtype, name, detail)
        found = Plan(chosen, route, wire_dtype, signature, few, shared, at_once)
        remember(group, key, found)
    return found


def remember(group: Group, key: tuple[object, ...], plan: object) -> None:
    """Keep what a shape of call has worked out, for the next call; of thousands of shapes the last ones."""
    if len(group.plans) > 4096:
        group.plans.clear()
    group.plans[key] = plan
