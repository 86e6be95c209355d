"""The allreduce: at once where few bytes travel with the agreement check, else by the algorithm of its plan. Which
tensors it takes: see :mod:`.operations`."""

from __future__ import annotations

import torch

from ..native.norm import Squares
from ..runtime.execute import Execution
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..runtime.operand import divided, operand_of
from ..runtime.world import resolve
from ..schedules import ALGORITHMS, compose
from ..transport.base import Carried, Pending
from ..window import loops
from ..window.exchange import Attachment
from .plan import Plan, plan_of
from .routes import hierarchical, piggyback
from .staging import as_flat, attach, put_back


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
    return start_allreduce(group, tensor, op, plan_of(group, "allreduce", tensor, op, name, algorithm, wire))


def start_allreduce(
    group: Group, tensor: torch.Tensor, op: str, plan: Plan, awaited: bool = False, squares: Squares | None = None
) -> Handle:
    """The same by ``plan``. ``awaited``: the caller goes on to wait for it. ``squares``: is told, where it is at hand,
    the sum of squares of a part of the result; the parts of all ranks make up the whole."""
    chosen, wire_dtype, signature, inline, load = plan
    # The window casts many fp32 numbers to a 16-bit wire by itself; everybody else sends what is staged.
    casts = chosen == "window" and tensor.dtype is torch.float32 and inline is None
    divisor, reduction = divided(op, group.size)
    staged: list[torch.Tensor] = []
    travelling: list[Carried] = []

    def stage() -> torch.Tensor:
        if not staged:
            staged.append(as_flat(tensor, tensor.dtype if casts else wire_dtype))
        return staged[0]

    def body() -> Pending:
        if group.size == 1 or tensor.numel() == 0:
            return
        flat = stage()
        if chosen == "window":
            yield from loops.allreduce(group, flat, wire_dtype, reduction, divisor, squares)
        elif chosen == "hierarchical":
            yield from hierarchical.allreduce(group, flat, reduction, divisor)
        elif travelling:
            yield from piggyback.allreduce(group, flat, travelling[0], reduction, divisor)
        else:
            schedule_of = ALGORITHMS[chosen]
            own = schedule_of.owners(flat.numel(), group.size)[group.rank]
            operand = operand_of(flat, op, chosen, group.size, own)
            schedule = compose.allreduce(schedule_of, group.rank, group.size, flat.numel())
            yield from group.execute(Execution(schedule, operand, group.transport))
        put_back(flat, tensor)

    def attached() -> Attachment | Carried:
        if load is not None:
            travelling.append(piggyback.carry(stage(), load))
            return travelling[0]
        return attach(group, stage(), inline=inline is not None) if chosen == "window" else Attachment()

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
    plan = plan_of(group, "allreduce", tensor, op, name, algorithm, wire)
    if plan.inline is not None and tensor.is_cpu and tensor.is_contiguous():
        divisor, reduction = divided(op, group.size)
        sent = tensor if plan.wire_dtype is tensor.dtype else as_flat(tensor, plan.wire_dtype)

        def otherwise() -> Pending:
            return loops.allreduce(group, sent.detach().view(-1), sent.dtype, reduction, divisor, None)

        if group.allreduce_inline(plan.signature, plan.inline, sent, otherwise):
            if sent is not tensor:
                put_back(sent, tensor)
            return tensor
    result: torch.Tensor = start_allreduce(group, tensor, op, plan, awaited=True).wait()
    return result
