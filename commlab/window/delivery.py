"""Delivery through the window: every rank offers a stream of bytes and says which range of it each peer gets.

    up to 64 KB     the stream travels in the control page, behind its table: one wait
    beyond          through the staging areas, 2 MiB of each rank's stream at a time: one wait more for each of them

Cost: each rank writes its stream once and reads what is meant for it once. Nothing is sent. Everybody reads everybody's
table, so a size on which two ranks differ is known to all of them before a byte is moved.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from ctypes import c_int64, memmove

import numpy as np
import numpy.typing as npt
import torch

from ..chunks import Range
from ..native.library import built
from ..schedules.step import NodeStep
from ..transport.base import Request
from .exchange import Attachment
from .loops import INLINE_BYTES, wait
from .memory import BLOCK_BYTES, Window

Table = npt.NDArray[np.int64]
"""What one rank says, three rows with a column per peer: where its range for the peer starts, where that stops, and how
many bytes it expects from the peer."""

ROWS = 3
_HALF_BYTES = 2 * BLOCK_BYTES


def inline_page(table: Table, stream: Sequence[torch.Tensor]) -> npt.NDArray[np.uint8] | None:
    """What this rank publishes with its record: its table, and behind it the whole ``stream`` (uint8, 1-D) where both
    fit. None where not even the table fits."""
    stream_bytes = sum(piece.numel() for piece in stream)
    if table.nbytes > INLINE_BYTES:
        return None
    fits = table.nbytes + stream_bytes <= INLINE_BYTES
    page = np.empty(table.nbytes + (stream_bytes if fits else 0), np.uint8)
    page[: table.nbytes] = table.reshape(-1).view(np.uint8)
    if fits:
        at = table.nbytes
        for piece in stream:
            page[at : at + piece.numel()] = piece.numpy()
            at += piece.numel()
    return page


def attachment(window: Window, page: npt.NDArray[np.uint8], table: Table) -> Attachment:
    """What :func:`inline_page` made, as the exchange publishes it. ``page`` has to live until then. A stream that did
    not fit has a staging area to pass from here on. Raises SharedMemoryError."""
    if not window.has_staging and not _is_inline(table):
        window.make_staging()
    return Attachment(address=page.ctypes.data, size_bytes=page.nbytes)


def tables_of(window: Window) -> list[Table]:
    """Every rank's table, once the exchange has brought them; copies."""
    size = window.size
    pages = (window.sync.inline_address(peer) for peer in range(size))
    return [
        np.ctypeslib.as_array((c_int64 * (ROWS * size)).from_address(page)).reshape(ROWS, size).copy() for page in pages
    ]


def deliver(
    window: Window, tables: Sequence[Table], stream: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]
) -> Generator[Request, None, NodeStep]:
    """Copy what every rank has for this one into ``outs`` (uint8, 1-D, one per rank, of the sizes that its table
    expects). ``tables``: everyone's, on which all agree. Runs after the exchange that has published
    :func:`inline_page`."""
    table_bytes = tables[0].nbytes
    lengths = [_stream_bytes(table) for table in tables]
    inline = [_is_inline(table) for table in tables]
    for peer, table in _neighbours_first(window, tables):
        if inline[peer] and outs[peer].numel():
            source = window.sync.inline_address(peer) + table_bytes + int(table[0, window.rank])
            memmove(outs[peer].data_ptr(), source, outs[peer].numel())
    rounds = max(
        (-(-length // _HALF_BYTES) for length, fits in zip(lengths, inline, strict=True) if not fits), default=0
    )
    # Mapped before this rank arrives: a peer that goes on, and ends, has this rank's arrival.
    areas = {peer: window.staging_of(peer) for peer in range(window.size) if rounds and not inline[peer]}
    for count in range(rounds):
        # Two halves, used alternately: what this round writes was read in the round before the last one, and everyone
        # has left that. The operation before may still be read when this one begins, so its exchange comes first.
        half_bytes = count % 2 * _HALF_BYTES
        shown = Range(count * _HALF_BYTES, (count + 1) * _HALF_BYTES)
        if not inline[window.rank]:
            _show(stream, shown, areas[window.rank] + half_bytes)
        window.sync.arrive()
        yield from wait(window)
        for peer, table in _neighbours_first(window, tables):
            wanted = Range(int(table[0, window.rank]), int(table[1, window.rank]))
            found = wanted.intersect(shown)
            if not inline[peer] and found.numel:
                target = outs[peer].data_ptr() + found.start - wanted.start
                _copy(target, areas[peer] + half_bytes + found.start - shown.start, found.numel)
    written = sum(out.numel() for out in outs)
    return NodeStep("delivery", written + lengths[window.rank], written + lengths[window.rank])


def _stream_bytes(table: Table) -> int:
    return int(table[1].max(initial=0))


def _is_inline(table: Table) -> bool:
    """Whether the stream travels behind its table."""
    return table.nbytes + _stream_bytes(table) <= INLINE_BYTES


def _neighbours_first(window: Window, tables: Sequence[Table]) -> list[tuple[int, Table]]:
    """Everyone starts with its neighbour: no two ranks read the same memory at a time."""
    order = [(window.rank + shift) % window.size for shift in range(window.size)]
    return [(peer, tables[peer]) for peer in order]


def _show(stream: Sequence[torch.Tensor], shown: Range, address: int) -> None:
    """Copy the range ``shown`` of the stream to ``address``."""
    start = 0
    for piece in stream:
        found = shown.intersect(Range(start, start + piece.numel()))
        if found.numel:
            _copy(address + found.start - shown.start, piece.data_ptr() + found.start - start, found.numel)
        start += piece.numel()


def _copy(target: int, source: int, size_bytes: int) -> None:
    assert built is not None
    if size_bytes < INLINE_BYTES:
        memmove(target, source, size_bytes)
    else:
        built.copy_through(target, source, size_bytes)
