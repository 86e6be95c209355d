"""Bytes of any dtype from every rank to every rank, in ranges of any size: what alltoall, gather, scatter and the
allgather of parts of different sizes are made of.

On one node through the window (:mod:`commlab.window.delivery`), elsewhere in one message per pair. Ranks compare kind,
dtype and root before, and each pair's two sizes on all ranks: a size on which two ranks differ is a DisagreementError
everywhere, before a byte is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..chunks import Range
from ..errors import DisagreementError
from ..runtime.agreement import Signature
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..transport.base import Pending, Request
from ..window import delivery
from ..window.exchange import NOTHING, Attachment

_ANY = -1
"""What a rank expects that takes what comes."""


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous CPU tensor of any dtype, 1-D, without a copy."""
    tensor = tensor.detach()
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    # A dimension of one number may have any stride and be contiguous, but not be seen as bytes.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def deliver_async(
    group: Group,
    signature: Signature,
    stream: Sequence[torch.Tensor],
    ranges: Sequence[Range],
    outs: Sequence[torch.Tensor] | Callable[[Sequence[int]], Sequence[torch.Tensor]],
    result: Any = None,
    finish: Callable[[], None] | None = None,
) -> Handle:
    """Start to bring the range ``ranges[r]``, in bytes, of this rank's ``stream`` to every rank r, and into ``outs[r]``
    what r has for this rank. Collective.

    ``stream``: pieces that lie one behind the other; ``outs``: one per rank, of the size that is expected from it. Both
    uint8, 1-D, contiguous, on the CPU; neither may be touched before the handle is done. Who can't know the sizes gives
    a function that is called with them, and makes the room. ``finish()`` runs at the end; ``result`` is what ``wait()``
    returns. DisagreementError on all ranks where the two sizes of a pair differ.
    """
    table = np.empty((delivery.ROWS, group.size), np.int64)
    table[0] = [span.start for span in ranges]
    table[1] = [span.stop for span in ranges]
    table[2] = _ANY if callable(outs) else [out.numel() for out in outs]
    page = delivery.inline_page(table, stream) if group.window is not None else None

    def attached() -> Attachment:
        if page is None:
            return NOTHING
        assert group.window is not None
        return delivery.attachment(group.window, page, table)

    def body() -> Pending:
        if group.size == 1:
            tables = [table]
        elif page is not None:
            assert group.window is not None
            tables = delivery.tables_of(group.window)
        else:
            exchange = group.transport.exchange(table.tobytes())
            while not exchange.test():
                yield exchange
            tables = [np.frombuffer(record, np.int64).reshape(table.shape) for record in exchange.records()]
        _compare(group, signature, tables)
        sizes = [int(each[1, group.rank] - each[0, group.rank]) for each in tables]
        room = outs(sizes) if callable(outs) else outs
        if page is not None:
            assert group.window is not None
            group.account((yield from delivery.deliver(group.window, tables, stream, room)))
        else:
            yield from _send(group, stream, ranges, room)
        if finish is not None:
            finish()

    return group.submit(signature, body(), result, attached)


def _compare(group: Group, signature: Signature, tables: Sequence[delivery.Table]) -> None:
    sent = np.stack([table[1] - table[0] for table in tables])
    expected = np.stack([table[2] for table in tables]).T
    wrong = np.argwhere((sent != expected) & (expected != _ANY))
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
