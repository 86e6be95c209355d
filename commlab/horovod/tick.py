"""One tick of a process set: each rank's announcement to all; and how the engine's thread waits for such."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from ..chunks import Range
from ..collectives.delivery import deliver_async
from ..runtime.agreement import Signature
from ..runtime.group import Group
from ..runtime.handle import Handle

Waits = Generator["Handle | None", None, None]
"""A computation that yields what it waits for: a handle, or None for something to do."""

_TICK = Signature("horovod's announcements")


def until(handle: Handle) -> Waits:
    """Go on once ``handle`` has ended; raises its error."""
    while not handle.finished:
        yield handle
    if handle.error is not None:
        raise handle.error


def tell(group: Group, record: bytes) -> Generator[Handle | None, None, list[bytes]]:
    """Every rank's record, in rank order. Collective; DisagreementError where another rank does something else."""
    if group.size == 1:
        return [record]
    own = (
        torch.frombuffer(bytearray(record), dtype=torch.uint8)
        if record
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )
    found: list[torch.Tensor] = []

    def room(sizes: Sequence[int]) -> list[torch.Tensor]:
        found.extend(torch.empty(size_bytes, dtype=torch.uint8, device="cpu") for size_bytes in sizes)
        return found

    yield from until(deliver_async(group, _TICK, [own], [Range(0, len(record))] * group.size, room))
    return [each.numpy().tobytes() for each in found]
