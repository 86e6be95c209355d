"""How the ranks of a window meet: what a rank publishes with its next operation, the wait for all ranks, the agreement
check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import PeerLostError
from .area import NOWHERE
from .memory import Window


class Attachment(NamedTuple):
    """What a rank publishes with its next operation in the window: where its data lie
    (:class:`commlab.window.memory.Place`), or the data themselves (address and size), up to 64 KB."""

    segment: int = NOWHERE
    offset: int = 0
    address: int = 0
    size_bytes: int = 0


NOTHING = Attachment()


class WindowWait:
    """A request: all ranks of the node have arrived. In messages a rank is named by its number in the window."""

    __slots__ = ("_window",)

    SOON = False
    """Whether others, too, have next to nothing to do before they arrive: where ranks share cores they are let go
    first."""

    def __init__(self, window: Window):
        self._window = window

    def test(self) -> bool:
        return bool(self._window.sync.lagging() < 0)

    def block(self, timeout_s: float) -> None:
        """Wait natively, asleep if the wait takes long. Raises PeerLostError when the awaited rank's process has
        ended."""
        late = self._window.sync.wait(timeout_s * 1e6, self.SOON)
        # The rank may have arrived and left in good order meanwhile; only then is its absence no loss.
        if late >= 0 and not self._window.alive(late) and self._window.sync.lagging() == late:
            raise PeerLostError(f"rank {late} is gone: its process ended while its peers waited for it")

    def peers(self) -> Sequence[int]:
        late = self._window.sync.lagging()
        return () if late < 0 else (late,)


class WindowExchange(WindowWait):
    """The agreement check in the window: records lie in the control pages, and the wait orders what follows."""

    __slots__ = ()
    SOON = True

    def __init__(self, window: Window, number: int, attached: Attachment | None):
        """``attached``: what this rank publishes now; None where the rank has published everything already."""
        self._window = window
        if attached is not None:
            window.sync.publish(number, *attached)

    def agreed(self, record: bytes) -> bool:
        return bool(self._window.sync.agreed())
