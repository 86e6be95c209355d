"""The allreduce: at once where few numbers travel through the window with the agreement check, else by the route of its
plan. Which tensors an allreduce takes: see :mod:`.operations`."""

from __future__ import annotations

from functools import partial

import torch

from ..native.norm import Squares
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..runtime.world import resolve
from ..transport.base import Pending
from .plan import Call, Plan, plan_of
from .routes import inline
from .staging import as_flat, put_back


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
    """Start the allreduce that ``plan`` was made for. ``awaited``: the caller goes on to wait for it. ``squares``: is
    given, where they are at hand, the sum of squares of a share of the result; the shares of all ranks make up the
    whole."""
    call = Call(group, plan, tensor, op, squares=squares)
    call.awaited = awaited
    launches = plan.launches(group)
    return group.submit(plan.signature, _body(call), tensor, partial(plan.route.attach, call), awaited, launches)


def _body(call: Call) -> Pending:
    if call.group.size > 1 and call.tensor.numel():
        yield from call.plan.route.allreduce(call)
        call.put_back()


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
    if plan.route is inline and tensor.is_cpu and tensor.is_contiguous():
        sent = tensor if plan.wire is tensor.dtype else as_flat(tensor, plan.wire)

        def otherwise() -> Pending:
            return inline.allreduce(Call(group, plan, sent, op))

        if group.allreduce_inline(plan.signature, plan.few, sent, otherwise):
            if sent is not tensor:
                put_back(sent, tensor)
            return tensor
    result: torch.Tensor = start_allreduce(group, tensor, op, plan, awaited=True).wait()
    return result
