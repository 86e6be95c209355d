"""What follows from the arguments of a call alone: whether it can be made, by which algorithm, on which wire, and the
signature that all ranks must agree on. Worked out once for each shape of call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..chunks import Range
from ..errors import UsageError
from ..native.dtypes import DTYPES, HALVES, WIRES, require_wire
from ..runtime.agreement import Signature
from ..runtime.group import Group
from . import routes
from .call import Plan
from .select import Conditions, choose

OPS = ("sum", "mean", "min", "max", "prod")


def require(group: Group, kind: str, tensor: torch.Tensor, op: str = "sum", wire: str | None = None) -> None:
    """UsageError for what no rank could do; what only differs between ranks is found by the agreement check."""
    where = f"rank {group.rank}: {kind} of {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    if tensor.dtype not in DTYPES:
        raise UsageError(
            f"{where}: dtypes are {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}; cast it"
        )
    if op not in OPS:
        raise UsageError(f"{where}: unknown op {op!r}; there are {', '.join(OPS)}")
    if op == "mean" and not tensor.dtype.is_floating_point:
        raise UsageError(f"{where}: the mean of integers is not an integer; use op='sum' and divide, or a float tensor")
    require_wire(wire, f"{where}: ")
    if wire is not None and (not tensor.dtype.is_floating_point or op not in ("sum", "mean")):
        raise UsageError(f"{where}: a 16-bit wire is for sum and mean of floating-point tensors, not op={op!r}")


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


def plan_of(
    group: Group,
    kind: str,
    tensor: torch.Tensor,
    op: str,
    name: str | None,
    algorithm: str,
    wire: str | None = None,
    chunks: Sequence[Range] | None = None,
) -> Plan:
    """The plan of a call: worked out once for each shape of call, then looked up."""
    key = (kind, tensor.shape, tensor.dtype, op, name, algorithm, wire, chunks)
    found = group.plans.get(key)
    if found is None:
        require(group, kind, tensor, op, wire)
        rooted = chunks is not None and any(chunk.numel == tensor.numel() for chunk in chunks)
        case_kind = {"reduce_scatter": "reduce", "allgather": "broadcast"}.get(kind, kind) if rooted else kind
        wire_dtype = WIRES[wire] or tensor.dtype
        chosen, _ = pick(group, case_kind, algorithm, tensor.numel(), wire_dtype)
        detail = f"{op}, {chosen}, wire {wire or 'as is'}"
        if chunks is not None and len(chunks) > 1:
            detail += f", chunks to {[chunk.stop for chunk in chunks]}"
        if len(group.plans) > 4096:
            group.plans.clear()
        row = routes.row_of(chosen)
        route, few = routes.load(row.file), None
        if row.few and kind == "allreduce":
            few_route = routes.load(row.few)
            few = few_route.load_of(group, tensor.numel(), wire_dtype, op)
            route = route if few is None else few_route
        signature = Signature(kind, tuple(tensor.shape), tensor.dtype, name, detail)
        found = group.plans[key] = Plan(chosen, route, wire_dtype, signature, few)
    return found
