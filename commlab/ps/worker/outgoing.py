"""What waits to leave in a frame: small pushes and pulls, by server, dtype and clock.

A frame leaves when it is full, and at each look at the links (``poll``, ``wait``, ``done``, ``step``). A call comes
here only while others of its server are not answered; so a call alone waits for nothing, and many calls share messages.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from .. import frames
from ..link import Order
from ..messages import FRAME_BYTES, FRAME_ENTRIES, NO_WIRE, WIRE_CODES, Header, Kind
from .calls import Item
from .client import Client

_Key: TypeAlias = tuple[int, bool, bool, int, torch.dtype | None]
"""Clock, whether the frame is late, whether it pulls, server, dtype."""


class _Filling:
    """A frame that is being filled."""

    __slots__ = ("items", "nbytes")

    def __init__(self) -> None:
        self.items: dict[int, Item] = {}
        """By first slice."""
        self.nbytes = 0


class Outgoing:
    """The frames that are being filled. ``wire``: the dtype in which numbers travel; None: as they are."""

    def __init__(self, client: Client, wire: torch.dtype | None):
        self._client, self._wire = client, wire
        self._filling: dict[_Key, _Filling] = {}
        client.send_frames = self.send

    def push(self, server: int, dtype: torch.dtype | None, clock: int, item: Item, nbytes: int) -> None:
        """Add an entry of a call that has begun. ``dtype``: of its numbers; None: there are none. The client's lock is
        held."""
        self._add((clock, False, False, server, dtype), item, nbytes)

    def pull(self, server: int, dtype: torch.dtype, clock: int, item: Item, nbytes: int, late: bool) -> None:
        """Add an entry of a call that has begun. ``late``: the pull must come after all numbers of its clock that were
        pushed before it. The client's lock is held."""
        self._add((clock, late, True, server, dtype), item, nbytes)

    def _add(self, key: _Key, item: Item, nbytes: int) -> None:
        filling = self._filling.get(key)
        if filling is not None and item.first in filling.items:
            self.send()
            filling = None
        if filling is None:
            filling = self._filling[key] = _Filling()
            self._client.filling = True
        items = filling.items
        items[item.first] = item
        filling.nbytes += nbytes
        if filling.nbytes >= FRAME_BYTES or len(items) >= FRAME_ENTRIES:
            self.send()
            self._client.poll()

    def send(self) -> None:
        """Send every frame, full or not: older clocks first, pushes before pulls. The client's lock is held."""
        if self._filling:
            filling, self._filling, self._client.filling = self._filling, {}, False
            for key in sorted(filling, key=lambda key: key[:4]):
                self._send(key, filling[key].items)

    def _send(self, key: _Key, items: dict[int, Item]) -> None:
        clock, late, pulls, server, dtype = key
        entries = sorted((item.first, item.slices) for item in items.values())
        wire = None if dtype is None else self._wire or dtype
        kind, body = Kind.PULL_FRAME, torch.empty(0, dtype=torch.uint8, device="cpu")
        if not pulls:
            kind = Kind.PUSH_FRAME
            if wire is not None:
                body = _side_by_side([items[first].numbers for first, _ in entries]).to(wire)
        header = Header(kind, len(entries), clock=clock, wire=NO_WIRE if wire is None else WIRE_CODES[wire])
        # A pull of the next clock follows this clock's pushes.
        now = min(clock, self._client.clock)
        order: Order = (now, 1, 0) if late else (now, 0, entries[0][0])
        self._client.submit_frame(server, order, header, frames.pack(entries, body), items, dtype)


def _side_by_side(numbers: list[torch.Tensor | None]) -> torch.Tensor:
    """``numbers`` (1-D each) in one tensor, on the CPU."""
    return torch.cat([each if each.is_cpu else each.cpu() for each in numbers if each is not None])
