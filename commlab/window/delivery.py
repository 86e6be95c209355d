"""Delivery through the window: every rank offers a stream of bytes and says which range of it each peer gets.

    up to 64 KB     the stream travels in the control page, behind its table: one wait
    up to 512 KB    in the rank's room: one wait, once the peers that read there have mapped it
    beyond          through the staging areas, 2 MiB of each rank's stream at a time: one wait more for each of them

Cost: each rank writes its stream once and reads what is meant for it once. Nothing is sent. Everybody reads everybody's
table, so a size on which two ranks differ is known to all of them before a byte is moved. The copies and waits are
native code's (kernels/cpu/node_delivery.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import trace
from ..chunks import Range
from ..native.library import built
from ..schedules.step import NodeStep
from .exchange import Attachment
from .loops import INLINE_BYTES, Loop, driven
from .memory import Window

Table = npt.NDArray[np.int64]
"""What one rank says, three rows with a column per peer: where its range for the peer starts, where that stops, and how
many bytes it expects from the peer."""

ROWS = 3
ANY: int = -1 if built is None else getattr(getattr(built, "NodeDelivery", None), "ANY", -1)
"""What a rank expects that takes what comes."""


def fits(size: int) -> bool:
    """Whether a table of ``size`` ranks fits in a control page; else the window has no deliveries."""
    return ROWS * 8 * size <= INLINE_BYTES


def addresses(pieces: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Where ``pieces`` (uint8, 1-D, contiguous) lie, and their bytes, for native code."""
    return [(piece.data_ptr(), piece.numel()) for piece in pieces]


class Delivery:
    """One delivery of this rank, or one after the other of the same sizes. ``stream``: address and bytes of the pieces
    that lie one behind the other, which stay as they are until the end; ``ranges``: which of these bytes each peer
    gets; ``expected``: how many bytes each peer has for this rank, :data:`ANY` where it takes what comes."""

    def __init__(
        self, window: Window, stream: Sequence[tuple[int, int]], ranges: Sequence[Range], expected: Sequence[int]
    ):
        assert built is not None
        self.window = window
        self.native: Any = built.NodeDelivery(
            window.sync, window.mapped, stream, [tuple(span) for span in ranges], list(expected)
        )
        self._stream_bytes = max((span.stop for span in ranges), default=0)

    def prepare(self) -> None:
        """Before it is announced: memory for what does not fit in the page. Raises SharedMemoryError."""
        if self.native.needs_staging:
            self.window.make_staging()

    def announced(self) -> Attachment:
        """What the exchange publishes."""
        self.prepare()
        self._page = np.empty(INLINE_BYTES, np.uint8)  # until it is published
        address = self._page.ctypes.data
        segment, offset, size_bytes = self.native.announce(address)
        return Attachment(segment, offset, address, size_bytes)

    def tables(self) -> list[Table]:
        """Every rank's table, once the exchange has brought them; copies."""
        size = self.window.size
        pages = (self.window.sync.inline_address(peer) for peer in range(size))
        return [
            np.ctypeslib.as_array((c_int64 * (ROWS * size)).from_address(page)).reshape(ROWS, size).copy()
            for page in pages
        ]

    def sizes(self) -> list[int]:
        """How many bytes each peer has for this rank, once the exchange has brought the tables."""
        return [self.native.size_from(peer) for peer in range(self.window.size)]

    def step(self, received_bytes: int) -> NodeStep:
        """What it reads and writes in all."""
        moved = received_bytes + self._stream_bytes
        return NodeStep("delivery", moved, moved)

    def run(self, outs: Sequence[torch.Tensor]) -> Loop:
        """Copy what every rank has for this one into ``outs`` (uint8, 1-D, one per rank, of the sizes that come). Runs
        after the exchange; all sizes agree."""
        native = self.native
        for peer in range(self.window.size):
            # Mapped before this rank arrives: a peer that goes on, and ends, has this rank's arrival.
            if native.needs_staging_of(peer):
                self.window.staging_of(peer)
        with trace.span("window delivery", "window"):
            native.move(addresses(outs))
            yield from driven(self.window, native)
        return self.step(sum(out.numel() for out in outs))
