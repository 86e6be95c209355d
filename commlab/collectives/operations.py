"""The collectives on tensors. All of them must be called by every rank of the group, in the same order.

Tensors: CPU or CUDA; float32, float64, float16, bfloat16, int32, int64; contiguous or not; empty allowed. Results are
bitwise the same on all ranks, and from run to run for the same algorithm and group; not across algorithms, which add in
different orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import native
from ..chunks import Range, split, whole_at
from ..errors import UsageError
from ..gradients.wire import WIRES
from ..native.arithmetic import DTYPES, OP_CODES
from ..transport.base import Carried
from . import ALGORITHMS, carried, hierarchical, schedules, window
from .execute import Execution, Operand, Pending
from .group import Attachment, Group, Inline
from .handle import Handle
from .select import Case, choose
from .signature import Signature
from .world import resolve

OPS = ("sum", "mean", "min", "max", "prod")
_HALVES = (torch.float16, torch.bfloat16)


def _require(group: Group, kind: str, tensor: torch.Tensor, op: str = "sum", wire: str | None = None) -> None:
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
    if wire not in WIRES:
        raise UsageError(f"{where}: unknown wire {wire!r}; there are None, fp16, bf16")
    if wire is not None and (not tensor.dtype.is_floating_point or op not in ("sum", "mean")):
        raise UsageError(f"{where}: a 16-bit wire is for sum and mean of floating-point tensors, not op={op!r}")


def _divided(op: str, size: int) -> tuple[int, str]:
    """What the reduced numbers are divided by, and how they are reduced."""
    return (size, "sum") if op == "mean" else (1, op)


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
        dtype in _HALVES,
        group.transport.name,
        window=not against["window"],
        hierarchical=not against["hierarchical"],
        nodes=len(group.nodes),
        carried=kind == "allreduce" and carried.load_of(group, numel, dtype.itemsize) is not None,
    )
    return choose(algorithm, case, (*ALGORITHMS, "window", "hierarchical"))


class _Plan(NamedTuple):
    """What follows from the arguments of a call alone, and need not be worked out when it is made again."""

    chosen: str
    wire_dtype: torch.dtype
    signature: Signature
    inline: Inline | None
    """Of an allreduce whose data travel with the agreement check in the window, and"""
    load: carried.Load | None
    """of one whose data travel with it in messages."""


def _plan(
    group: Group,
    kind: str,
    tensor: torch.Tensor,
    op: str,
    name: str | None,
    algorithm: str,
    wire: str | None = None,
    chunks: Sequence[Range] | None = None,
) -> _Plan:
    key = (kind, tensor.shape, tensor.dtype, op, name, algorithm, wire, chunks)
    found = group.plans.get(key)
    if found is None:
        _require(group, kind, tensor, op, wire)
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
        if in_window and 0 < tensor.numel() * wire_dtype.itemsize <= window.INLINE_BYTES:
            divisor, reduction = _divided(op, group.size)
            inline = Inline(tensor.numel(), DTYPES[wire_dtype][0], OP_CODES[reduction], divisor)
        signature = Signature(kind, tuple(tensor.shape), tensor.dtype, name, detail)
        by_direct = kind == "allreduce" and chosen == "direct"
        load = carried.load_of(group, tensor.numel(), wire_dtype.itemsize) if by_direct else None
        found = _Plan(chosen, wire_dtype, signature, inline, load)
        group.plans[key] = found
    return found


def _attach(group: Group, flat: torch.Tensor, inline: bool = False) -> Attachment:
    """Where ``flat`` lies in the window, if it does; or its data, where they are few and every rank wants all of
    them."""
    assert group.window is not None
    size_bytes = flat.numel() * flat.element_size()
    if inline and size_bytes <= window.INLINE_BYTES:
        return Attachment(address=flat.data_ptr(), size_bytes=size_bytes)
    place = group.window.locate(flat)
    return Attachment() if place is None else Attachment(place.segment, place.offset)


def _place(group: Group, flat: torch.Tensor, chosen: str) -> Attachment:
    return _attach(group, flat) if chosen == "window" else Attachment()


def empty(shape: Sequence[int] | int, dtype: torch.dtype = torch.float32, group: Group | None = None) -> torch.Tensor:
    """A tensor that lives in the window, zeroed: collectives on it copy nothing. Not collective; the memory is given
    back at shutdown. Where the group shares no window, an ordinary tensor."""
    group = resolve(group)
    if group.window is None:
        return torch.zeros(shape, dtype=dtype)
    shape = torch.Size((shape,) if isinstance(shape, int) else shape)
    memory, _ = group.window.allocate(shape.numel() * dtype.itemsize)
    return memory.view(dtype).view(shape)


def _staged(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor as a flat CPU buffer of ``dtype``: itself where it is one already, else a copy."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_cpu and tensor.dtype is dtype and tensor.is_contiguous():
        return tensor if tensor.dim() == 1 else tensor.view(-1)
    return tensor.to("cpu", dtype).contiguous().view(-1)


def _return(flat: torch.Tensor, tensor: torch.Tensor) -> None:
    """Write a staged buffer back where it is a copy."""
    if flat is not tensor and (flat.data_ptr() != tensor.data_ptr() or flat.dtype != tensor.dtype):
        tensor.detach().copy_(flat.view(tensor.shape))


def _operand(
    flat: torch.Tensor, op: str, chosen: str, size: int, own: Range, wide: torch.Tensor | None = None
) -> Operand:
    """How the algorithm treats this buffer (DESIGN "Rounding").

    16-bit: ``direct`` sums in fp32 at the owner, and divides there before it rounds; the others round at every hop, so
    a mean is divided first, which keeps the sum in range.
    """
    divisor, reduction = _divided(op, size)
    if flat.dtype not in _HALVES:
        return Operand(flat, reduction, divisor)
    if chosen == "direct":
        return Operand(flat, reduction, divisor, own, wide)
    if divisor != 1:
        native.divide(flat, 0, flat.numel(), divisor)
    return Operand(flat, reduction)


def allreduce_async(
    tensor: torch.Tensor,
    op: str = "mean",
    name: str | None = None,
    algorithm: str = "auto",
    wire: str | None = None,
    group: Group | None = None,
) -> Handle:
    """Start to reduce ``tensor`` in place over all ranks; the handle's ``wait()`` returns it. Don't touch it until
    then.

    ``op``: sum, mean, min, max, prod. ``wire``: ``"fp16"`` or ``"bf16"`` sends 16-bit numbers: contributions and the
    result are rounded to it. Cost and rounding: see the algorithm's page; ``auto`` is :mod:`.select`. Errors:
    UsageError; from ``wait()``: DisagreementError, PeerLostError, PeerTimeoutError.
    """
    group = resolve(group)
    return _start_allreduce(group, tensor, op, _plan(group, "allreduce", tensor, op, name, algorithm, wire))


def _start_allreduce(group: Group, tensor: torch.Tensor, op: str, plan: _Plan, awaited: bool = False) -> Handle:
    chosen, wire_dtype, signature, inline, load = plan
    # The window casts many fp32 numbers to a 16-bit wire by itself; everybody else sends what is staged.
    casts = chosen == "window" and tensor.dtype is torch.float32 and inline is None
    divisor, reduction = _divided(op, group.size)
    staged: list[torch.Tensor] = []
    travelling: list[Carried] = []

    def stage() -> torch.Tensor:
        if not staged:
            staged.append(_staged(tensor, tensor.dtype if casts else wire_dtype))
        return staged[0]

    def body() -> Pending:
        if group.size == 1 or tensor.numel() == 0:
            return
        flat = stage()
        if chosen == "window":
            yield from window.allreduce(group, flat, wire_dtype, reduction, divisor)
        elif chosen == "hierarchical":
            yield from hierarchical.allreduce(group, flat, reduction, divisor)
        elif travelling:
            yield from carried.allreduce(group, flat, travelling[0], reduction, divisor)
        else:
            schedule_of = ALGORITHMS[chosen]
            own = schedule_of.owners(flat.numel(), group.size)[group.rank]
            operand = _operand(flat, op, chosen, group.size, own)
            schedule = schedules.allreduce(schedule_of, group.rank, group.size, flat.numel())
            yield from group.execute(Execution(schedule, operand, group.transport))
        _return(flat, tensor)

    def attached() -> Attachment | Carried:
        if load is not None:
            travelling.append(carried.carry(stage(), load))
            return travelling[0]
        return _attach(group, stage(), inline=wire_dtype is stage().dtype) if chosen == "window" else Attachment()

    return group.submit(signature, body(), tensor, attached, awaited)


def allreduce(
    tensor: torch.Tensor,
    op: str = "mean",
    name: str | None = None,
    algorithm: str = "auto",
    wire: str | None = None,
    group: Group | None = None,
) -> torch.Tensor:
    """Reduce ``tensor`` in place over all ranks and return it; see :func:`allreduce_async`."""
    group = resolve(group)
    plan = _plan(group, "allreduce", tensor, op, name, algorithm, wire)
    if plan.inline is not None and tensor.is_cpu and tensor.is_contiguous():
        divisor, reduction = _divided(op, group.size)
        sent = tensor if plan.wire_dtype is tensor.dtype else _staged(tensor, plan.wire_dtype)

        def otherwise() -> Pending:
            return window.allreduce(group, sent.detach().view(-1), sent.dtype, reduction, divisor)

        if group.allreduce_inline(plan.signature, plan.inline, sent, otherwise):
            if sent is not tensor:
                _return(sent, tensor)
            return tensor
    result: torch.Tensor = _start_allreduce(group, tensor, op, plan, awaited=True).wait()
    return result


def reduce_chunks_async(
    flat: torch.Tensor,
    chunks: Sequence[Range],
    op: str = "mean",
    name: str | None = None,
    algorithm: str = "auto",
    group: Group | None = None,
) -> Handle:
    """Start to reduce rank r's chunk of ``flat`` on rank r, in place. ``flat``: 1-D, contiguous, CPU; afterwards only
    this rank's chunk means anything. The parameter server's push: with all of it in one chunk, a reduce to that rank.

    The handle returns this rank's chunk: a view of ``flat``, or for a 16-bit ``flat`` the fp32 sums that were never
    rounded (``direct``), so the whole push rounds once, when it was packed.
    """
    group = resolve(group)
    chunks = tuple(chunks)
    chosen, _, signature, *_ = _plan(group, "reduce_scatter", flat, op, name, algorithm, chunks=chunks)
    own = chunks[group.rank]
    wide = None
    if flat.dtype in _HALVES and chosen in ("direct", "window") and group.size > 1:
        wide = torch.empty(own.numel, dtype=torch.float32)

    def body() -> Pending:
        if group.size == 1 or flat.numel() == 0:
            return
        if chosen == "window":
            divisor, reduction = _divided(op, group.size)
            yield from window.reduce_chunks(group, flat, chunks, reduction, divisor, wide)
            return
        operand = _operand(flat, op, chosen, group.size, own, wide)
        schedule = schedules.reduce_scatter(ALGORITHMS[chosen], group.rank, chunks)
        yield from group.execute(Execution(schedule, operand, group.transport))

    result = flat[own.start : own.stop] if wide is None else wide
    return group.submit(signature, body(), result, lambda: _place(group, flat, chosen))


def gather_chunks_async(
    flat: torch.Tensor,
    chunks: Sequence[Range],
    name: str | None = None,
    algorithm: str = "auto",
    group: Group | None = None,
) -> Handle:
    """Start to bring rank r's chunk of ``flat`` from rank r to all ranks, in place, for all r. ``flat``: 1-D,
    contiguous, CPU. The parameter server's pull: with all of it in one chunk, a broadcast."""
    group = resolve(group)
    chunks = tuple(chunks)
    chosen, _, signature, *_ = _plan(group, "allgather", flat, "sum", name, algorithm, chunks=chunks)

    def body() -> Pending:
        if group.size == 1 or flat.numel() == 0:
            return
        if chosen == "window":
            yield from window.gather_chunks(group, flat, chunks)
            return
        schedule = schedules.allgather(ALGORITHMS[chosen], group.rank, chunks)
        yield from group.execute(Execution(schedule, Operand(flat), group.transport))

    return group.submit(signature, body(), flat, lambda: _place(group, flat, chosen))


def _chunks_of(group: Group, kind: str, part: torch.Tensor, whole: torch.Tensor) -> tuple[Range, ...]:
    chunks = split(whole.numel(), group.size)
    if part.dtype != whole.dtype or part.numel() != chunks[group.rank].numel:
        raise UsageError(
            f"rank {group.rank}: {kind} cuts {whole.numel()} numbers of {whole.dtype} into "
            f"{[chunk.numel for chunk in chunks]} for "
            f"{group.size} ranks; this rank's part has {part.numel()} numbers of {part.dtype}"
        )
    return chunks


def reduce_scatter(
    out: torch.Tensor,
    tensor: torch.Tensor,
    op: str = "mean",
    name: str | None = None,
    algorithm: str = "auto",
    group: Group | None = None,
) -> torch.Tensor:
    """Write this rank's part of the reduced ``tensor`` into ``out`` and return it; ``tensor`` is left as it was.

    Part r of P is :func:`commlab.chunks.split`'s (the first ``numel mod P`` ranks hold one number more). Cost: half an
    allreduce, and a copy of ``tensor``.
    """
    group = resolve(group)
    _require(group, "reduce_scatter", tensor, op)
    chunks = _chunks_of(group, "reduce_scatter", out, tensor)
    flat = tensor.detach().to("cpu").reshape(-1).clone()
    part = reduce_chunks_async(flat, chunks, op, name, algorithm, group).wait()
    out.detach().copy_(part.view(out.shape))
    return out


def allgather(
    out: torch.Tensor,
    tensor: torch.Tensor,
    name: str | None = None,
    algorithm: str = "auto",
    group: Group | None = None,
) -> torch.Tensor:
    """Write every rank's ``tensor``, one after the other, into ``out`` on all ranks and return it. The parts are cut as
    in :func:`reduce_scatter`. Cost: half an allreduce."""
    group = resolve(group)
    _require(group, "allgather", tensor)
    chunks = _chunks_of(group, "allgather", tensor, out)
    flat = _staged(out, out.dtype)
    own = chunks[group.rank]
    flat[own.start : own.stop].copy_(tensor.detach().reshape(-1))
    gather_chunks_async(flat, chunks, name, algorithm, group).wait()
    _return(flat, out)
    return out


def _rooted(group: Group, kind: str, root: int) -> None:
    if not 0 <= root < group.size:
        raise UsageError(f"rank {group.rank}: {kind} with root {root}; the group has ranks 0..{group.size - 1}")


def broadcast(
    tensor: torch.Tensor, root: int = 0, name: str | None = None, algorithm: str = "auto", group: Group | None = None
) -> torch.Tensor:
    """Overwrite ``tensor`` on all ranks with ``root``'s and return it. Cost with ``tree``: ceil(log2 P) steps; the root
    sends n ceil(log2 P); with ``ring`` (a pipelined chain): every rank but the last sends n once."""
    group = resolve(group)
    _rooted(group, "broadcast", root)
    _require(group, "broadcast", tensor)
    flat = _staged(tensor, tensor.dtype)
    chunks = whole_at(root, flat.numel(), group.size)
    gather_chunks_async(flat, chunks, name, algorithm, group).wait()
    _return(flat, tensor)
    return tensor


def reduce(
    tensor: torch.Tensor,
    root: int = 0,
    op: str = "mean",
    name: str | None = None,
    algorithm: str = "auto",
    group: Group | None = None,
) -> torch.Tensor:
    """Reduce ``tensor`` in place on ``root`` and return it; on the other ranks it is left as it was. Cost with
    ``tree``: ceil(log2 P) steps, every rank but the root sends n."""
    group = resolve(group)
    _rooted(group, "reduce", root)
    _require(group, "reduce", tensor, op)
    flat = tensor.detach().to("cpu").reshape(-1).clone()
    chunks = whole_at(root, flat.numel(), group.size)
    part = reduce_chunks_async(flat, chunks, op, name, algorithm, group).wait()
    if group.rank == root:
        tensor.detach().copy_(part.view(tensor.shape))
    return tensor


def barrier(group: Group | None = None) -> None:
    """Return once every rank has called it."""
    resolve(group).barrier()
