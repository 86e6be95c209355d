"""Bytes of any dtype from every rank to every rank, in ranges of any size: what alltoall, gather, scatter and the
allgather of parts of different sizes are made of.

On one node through the window (:mod:`commlab.window.delivery`), elsewhere in one message per pair. Ranks compare kind,
dtype and root before, and each pair's two sizes on all ranks: a size on which two ranks differ is a DisagreementError
everywhere, before a byte is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from ..chunks import Range, adjoining
from ..errors import DisagreementError, SharedMemoryError
from ..runtime.agreement import Signature
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..transport.base import AtOnce, Counts, Pending, Request
from ..window import delivery
from ..window.loops import driven

Outs: TypeAlias = Sequence[torch.Tensor] | Callable[[Sequence[int]], Sequence[torch.Tensor]]
"""Where to write what comes from each rank; or what makes that room once the sizes in bytes are known."""


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous CPU tensor of any dtype, 1-D, without a copy."""
    tensor = tensor.detach()
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    # A dimension of one number may have any stride and be contiguous, but not be seen as bytes.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _expected(outs: Outs) -> list[int] | None:
    """How many bytes each rank is expected to have; None for who takes what comes."""
    return None if callable(outs) else [out.numel() for out in outs]


def in_window(group: Group) -> bool:
    """Whether deliveries of ``group`` go through its window."""
    return group.window is not None and delivery.fits(group.size)


def _delivery_of(
    group: Group, stream: Sequence[torch.Tensor], ranges: Sequence[Range], outs: Outs
) -> delivery.Delivery | None:
    """None where a delivery of ``group`` goes as messages."""
    if not in_window(group):
        return None
    assert group.window is not None
    return delivery.Delivery(
        group.window, delivery.addresses(stream), ranges, _expected(outs) or [delivery.ANY] * group.size
    )


def deliver_async(
    group: Group,
    signature: Signature,
    stream: Sequence[torch.Tensor],
    ranges: Sequence[Range],
    outs: Outs,
    result: Any = None,
    finish: Callable[[], None] | None = None,
    awaited: bool = False,
) -> Handle:
    """Start to bring the range ``ranges[r]``, in bytes, of this rank's ``stream`` to every rank r, and into ``outs[r]``
    what r has for this rank. Collective.

    ``stream``: pieces that lie one behind the other; ``outs``: one per rank, of the size that is expected from it. Both
    uint8, 1-D, contiguous, on the CPU; neither may be touched before the handle is done. Who can't know the sizes gives
    a function that is called with them, and makes the room. ``finish()`` runs at the end; ``result`` is what ``wait()``
    returns. ``awaited``: the caller waits for it at once. DisagreementError on all ranks where the two sizes of a pair
    differ.
    """
    through = _delivery_of(group, stream, ranges, outs)
    if through is None:
        return group.submit(
            signature, _by_messages(group, signature, stream, ranges, outs, finish), result, None, awaited
        )
    body = _through_window(group, signature, through, stream, outs, finish)
    return group.submit(signature, body, result, through.announced, awaited)


def deliver(
    group: Group,
    signature: Signature,
    stream: Sequence[torch.Tensor],
    ranges: Sequence[Range],
    outs: Sequence[torch.Tensor],
    finish: Callable[[], None] | None = None,
) -> None:
    """:func:`deliver_async` for a caller that waits: in the window one native call."""
    if not deliver_at_once(group, signature, stream, ranges, outs):
        deliver_async(group, signature, stream, ranges, outs, None, finish, awaited=True).wait()
    elif finish is not None:
        finish()


def deliver_at_once(
    group: Group,
    signature: Signature,
    stream: Sequence[torch.Tensor],
    ranges: Sequence[Range],
    outs: Sequence[torch.Tensor],
) -> bool:
    """The delivery in one native call; whether it was possible just now. If not, nothing was done."""
    through = _delivery_of(group, stream, ranges, outs)
    if through is None:
        return False
    try:
        through.prepare()
    except SharedMemoryError:
        return False  # the long way tells all ranks of it
    call = AtOnce(
        through.native.call,
        (delivery.addresses(outs),),
        partial(_resume, through),
        _done(through, sum(out.numel() for out in outs)),
    )
    return group.at_once(signature, call, (stream, outs), 0)


def _done(through: delivery.Delivery, received_bytes: int) -> dict[int, Counts]:
    step = through.step(received_bytes)
    return {through.native.DONE: Counts(node_bytes_read=step.bytes_read, node_bytes_written=step.bytes_written)}


def _resume(
    through: delivery.Delivery,
    group: Group,
    signature: Signature,
    sequence: int,
    kept: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    left: int,
) -> Pending:
    stream, outs = kept
    if left == through.native.UNDER_WAY:
        yield from driven(through.window, through.native)
        group.account(through.step(sum(out.numel() for out in outs)))
        return
    # The page is published.
    rest = _through_window(group, signature, through, stream, outs, None)
    yield from group.agreement.before(signature, sequence, rest, lambda: None)


class WholeDelivery:
    """Deliveries out of one tensor into another, both contiguous, of which nothing but the memory differs from call to
    call: what is worked out once. ``ranges``: the bytes for each rank, one behind the other; ``expected``: how many
    come from each rank. Where :func:`in_window`; raises SharedMemoryError."""

    def __init__(self, group: Group, signature: Signature, ranges: Sequence[Range], expected: Sequence[int]):
        assert group.window is not None
        self._signature, self._expected = signature, list(expected)
        through = delivery.Delivery(group.window, [(0, ranges[-1].stop)], ranges, expected)
        through.prepare()
        self._call = AtOnce(
            through.native.call_whole, (), partial(self._resume, through), _done(through, sum(expected))
        )

    @classmethod
    def even(cls, group: Group, signature: Signature, out: torch.Tensor, tensor: torch.Tensor) -> WholeDelivery | None:
        """In equal parts, as large as these tensors have them. None where there is no memory for it, of which the long
        way tells all ranks."""
        size = group.size
        try:
            return cls(group, signature, adjoining([tensor.nbytes // size] * size), [out.nbytes // size] * size)
        except SharedMemoryError:
            return None

    def at_once(self, group: Group, out: torch.Tensor, tensor: torch.Tensor) -> bool:
        """One of them, as one native call; whether it was possible just now. If not, nothing was done."""
        return group.at_once(self._signature, self._call, (tensor, out), tensor.data_ptr(), out.data_ptr())

    def _resume(
        self,
        through: delivery.Delivery,
        group: Group,
        signature: Signature,
        sequence: int,
        kept: tuple[torch.Tensor, torch.Tensor],
        left: int,
    ) -> Pending:
        tensor, out = kept
        pieces = [bytes_of(tensor)], bytes_of(out).split(self._expected)
        return _resume(through, group, signature, sequence, pieces, left)


def _through_window(
    group: Group,
    signature: Signature,
    through: delivery.Delivery,
    stream: Sequence[torch.Tensor],
    outs: Outs,
    finish: Callable[[], None] | None,
) -> Pending:
    """What follows the exchange. ``stream``: what has the memory."""
    if not through.native.sizes_agree():
        _compare(group, signature, through.tables())
    room = outs(through.sizes()) if callable(outs) else outs
    group.account((yield from through.run(room)))
    if finish is not None:
        finish()


def _by_messages(
    group: Group,
    signature: Signature,
    stream: Sequence[torch.Tensor],
    ranges: Sequence[Range],
    outs: Outs,
    finish: Callable[[], None] | None,
) -> Pending:
    table = np.empty((delivery.ROWS, group.size), np.int64)
    table[0] = [span.start for span in ranges]
    table[1] = [span.stop for span in ranges]
    table[2] = _expected(outs) or delivery.ANY
    tables = [table]
    if group.size > 1:
        exchange = group.transport.exchange(table.tobytes())
        while not exchange.test():
            yield exchange
        tables = [np.frombuffer(record, np.int64).reshape(table.shape) for record in exchange.records()]
    _compare(group, signature, tables)
    sizes = [int(each[1, group.rank] - each[0, group.rank]) for each in tables]
    yield from _send(group, stream, ranges, outs(sizes) if callable(outs) else outs)
    if finish is not None:
        finish()


def _compare(group: Group, signature: Signature, tables: Sequence[delivery.Table]) -> None:
    sent = np.stack([table[1] - table[0] for table in tables])
    expected = np.stack([table[2] for table in tables]).T
    wrong = np.argwhere((sent != expected) & (expected != delivery.ANY))
    if len(wrong):
        frm, to = (int(rank) for rank in wrong[0])
        more = f" (and {len(wrong) - 1} more pairs of ranks)" if len(wrong) > 1 else ""
        raise DisagreementError(
            f"ranks disagree (seen on rank {group.rank}): {signature.kind}: rank {frm} sends {sent[frm, to]} bytes to "
            f"rank {to}, which expects {expected[frm, to]}{more}. Nothing was moved. What one rank sends another must "
            "be as large as what that one has room for: compare shapes, dtypes and split sizes"
        )


def _send(
    group: Group, stream: Sequence[torch.Tensor], ranges: Sequence[Range], outs: Sequence[torch.Tensor]
) -> Pending:
    """One message per pair; nobody's own."""
    whole = stream[0] if len(stream) == 1 else torch.cat([torch.empty(0, dtype=torch.uint8, device="cpu"), *stream])
    own = ranges[group.rank]
    outs[group.rank].copy_(whole[own.start : own.stop])
    requests: list[Request] = []
    others = [(group.rank + shift) % group.size for shift in range(1, group.size)]
    for peer in others:
        if outs[peer].numel():
            requests.append(group.transport.irecv(outs[peer].numpy(), peer))
    for peer in others:
        span = ranges[peer]
        if span.numel:
            requests.append(group.transport.isend(whole[span.start : span.stop].numpy(), peer))
            group.bytes_sent += span.numel
            group.messages_sent += 1
    for request in requests:
        while not request.test():
            yield request
