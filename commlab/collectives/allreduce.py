"""The allreduce: at once where few numbers travel with the agreement check by native code, else by the route of its
plan. Which tensors an allreduce takes: see :mod:`.operations`."""

from __future__ import annotations

from functools import partial

import torch

from ..errors import UsageError
from ..native.norm import Squares
from ..native.versions import count_write
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..runtime.world import resolve
from ..transport.base import Pending
from .known import at_once_where_known, know
from .plan import Call, Plan, given_as, plan_of, where_of
from .staging import as_flat, put_back
from .tensors import PAGE_BITS, PLAIN, may_write_at, writable, writable_pages


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
    try:
        plan = plan_of(group, "allreduce", tensor, op, name, algorithm, wire)
        memory = writable(tensor, where_of(group, "allreduce", tensor))
    except Exception as error:
        return group.refuse("allreduce", name, error)
    return start_allreduce(group, memory, op, plan, users=tensor)


def start_allreduce(
    group: Group,
    tensor: torch.Tensor,
    op: str,
    plan: Plan,
    awaited: bool = False,
    squares: Squares | None = None,
    users: torch.Tensor | None = None,
) -> Handle:
    """Start the allreduce that ``plan`` was made for. ``awaited``: the caller goes on to wait for it. ``squares``: is
    given, where they are at hand, the sum of squares of a share of the result; the shares of all ranks make up the
    whole. ``users``: the tensor that the user has given, of which ``tensor`` is the memory."""
    call = Call(group, plan, tensor, op, squares=squares)
    call.awaited = awaited
    if users is None and group.size > 1:
        count_write((tensor,))  # nobody does it at the end
    result, launches = tensor if users is None else users, plan.launches(group)
    return group.submit(plan.signature, _body(call, users), result, partial(plan.route.attach, call), awaited, launches)


def _body(call: Call, users: torch.Tensor | None) -> Pending:
    if call.group.size > 1 and call.tensor.numel():
        yield from call.plan.route.allreduce(call)
        call.put_back()
        if users is not None:
            count_write((users,))


def _named(error: Exception, tensor: torch.Tensor, where: str) -> Exception:
    """``error``, or what names the tensor whose memory can't be reached (inside vmap, grad and their like)."""
    try:
        writable(tensor, where)
    except UsageError as named:
        return named
    return error


def allreduce(
    tensor: torch.Tensor,
    op: str = "mean",
    name: str | None = None,
    algorithm: str = "auto",
    wire: str | None = None,
    group: Group | None = None,
) -> torch.Tensor:
    """Reduce ``tensor`` in place over all ranks and return it; see :func:`allreduce_async`."""
    if at_once_where_known(tensor, op, name, algorithm, wire, group):
        return tensor
    if type(group) is not Group:
        group = resolve(group)
    sent, address = None, 0
    try:
        plan = plan_of(group, "allreduce", tensor, op, name, algorithm, wire)
        at_once = plan.at_once
        if (
            at_once is not None
            and type(tensor) in PLAIN
            and tensor.is_cpu
            and tensor.is_contiguous()
            and not tensor.is_neg()
            and ((address := tensor.data_ptr()) >> PAGE_BITS in writable_pages or may_write_at(address))
            and (
                plan.few is not None
                or (last := address + tensor.nbytes - 1) >> PAGE_BITS in writable_pages
                or may_write_at(last)
            )
        ):
            sent = tensor
            if wire is not None:
                sent = as_flat(tensor, given_as(plan.route, tensor.dtype, plan.wire))
                address = sent.data_ptr()
        else:
            memory = writable(tensor, where_of(group, "allreduce", tensor))
    except Exception as error:
        group.refuse("allreduce", name, _named(error, tensor, where_of(group, "allreduce", tensor))).wait()
        raise
    if sent is not None and at_once is not None:
        kept, more = (sent, ()) if plan.shared is None else ((sent, None), (0,))
        if group.at_once(plan.signature, at_once, kept, address, *more):
            if sent is not tensor:
                put_back(sent, tensor)
            else:
                know(group, plan, tensor, op, name, algorithm)
            count_write((tensor,))
            return tensor
        memory = tensor.detach()
    result: torch.Tensor = start_allreduce(group, memory, op, plan, awaited=True, users=tensor).wait()
    return result
