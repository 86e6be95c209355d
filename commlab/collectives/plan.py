"""What follows from the arguments of a call alone: whether it can be made, by which algorithm, on which wire, and the
signature that all ranks must agree on. Worked out once for each shape of call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..chunks import Range
from ..errors import UsageError
from ..native.dtypes import DTYPES, HALVES, OP_CODES, WIRES, require_wire
from ..runtime.agreement import Signature
from ..runtime.group import Group
from ..runtime.operand import divided
from ..window import loops
from ..window.exchange import Inline
from .routes import hierarchical, piggyback
from .select import CHOICES, Case, choose

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
    against = {
        "window": "" if group.window is not None else group.window_reason,
        "hierarchical": hierarchical.reason_against(group),
    }
    if against.get(algorithm):
        raise UsageError(f"rank {group.rank}: algorithm {algorithm} is not to be had: {against[algorithm]}")
    if algorithm == "hierarchical" and kind != "allreduce":
        raise UsageError(f"rank {group.rank}: algorithm hierarchical is for allreduce, not for {kind}; use auto")
    case = Case(
        kind,
        group.size,
        numel * dtype.itemsize,
        dtype in HALVES,
        group.transport.name,
        window=not against["window"],
        hierarchical=not against["hierarchical"],
        nodes=len(group.nodes),
        carried=kind == "allreduce" and piggyback.load_of(group, numel, dtype.itemsize) is not None,
    )
    return choose(algorithm, case, CHOICES[1:])


class Plan(NamedTuple):
    """What follows from the arguments of a call alone, and need not be worked out when it is made again."""

    chosen: str
    wire_dtype: torch.dtype
    signature: Signature
    inline: Inline | None
    """Of an allreduce whose data travel with the agreement check in the window, and"""
    load: piggyback.Load | None
    """of one whose data travel with it in messages."""


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
        inline = None
        in_window = kind == "allreduce" and chosen == "window"
        if in_window and 0 < tensor.numel() * wire_dtype.itemsize <= loops.INLINE_BYTES:
            divisor, reduction = divided(op, group.size)
            inline = Inline(tensor.numel(), DTYPES[wire_dtype][0], OP_CODES[reduction], divisor)
        signature = Signature(kind, tuple(tensor.shape), tensor.dtype, name, detail)
        by_direct = kind == "allreduce" and chosen == "direct"
        load = piggyback.load_of(group, tensor.numel(), wire_dtype.itemsize) if by_direct else None
        found = Plan(chosen, wire_dtype, signature, inline, load)
        group.plans[key] = found
    return found
