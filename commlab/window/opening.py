"""The opening of a window, on all ranks or on none: one exchange of cards, and one wait in the control pages.

    1  each rank makes its control page, and gives its card to all                    (or says why it can't)
    2  it maps all pages, and publishes in its own that it has, or that it could not
    3  all have published: every rank that has mapped all pages reads what each of them says

Whoever could not map a page knows that nobody gets a window, and whoever could has every page before it: so all ranks
come to the same end, though in step 3 nobody sends anything. Only a window that some rank can't have costs a second
exchange, of the reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import SharedMemoryError
from ..native import library
from .area import NOWHERE
from .memory import Window

_DONE = b"\0"
"""Begins the card of a rank that has made its part; else it is the reason why not, which is text."""
_OPENED, _FAILED = 1, 2

Gather = Callable[[bytes, str], list[bytes]]
"""``gather(data, name)``: every rank's data on every rank, in rank order; ``name`` is for messages."""


class Opening:
    """This rank's part in the opening of a window of ``size`` ranks."""

    def __init__(self, local_rank: int, size: int):
        self._made: Window | None = None
        try:
            self._made = Window(local_rank, size)
            self.card = _DONE + self._made.card()
            """What all ranks have to know of this one."""
        except SharedMemoryError as error:
            self.card = str(error).encode(errors="backslashreplace")

    def conclude(
        self, cards: Sequence[bytes], spin_us: float, gather: Gather, wait: Callable[[Window], None]
    ) -> tuple[Window | None, str]:
        """The window, or None on all ranks, and why. Collective over them. ``cards``: all ranks', in rank order;
        ``wait(window)``: returns once all ranks have arrived in it."""
        reasons = [card.decode() for card in cards if not card.startswith(_DONE)]
        window = self._made
        if window is None or reasons:
            self.give_up()
            return None, reasons[0]
        reason = self._open(window, [card[len(_DONE) :] for card in cards], spin_us)
        if not reason:
            try:
                wait(window)
            except BaseException:
                self.give_up()
                raise
            if window.sync.agreed():
                return window, ""
        # Until all have their reasons, each finds this rank's page: it must not be missed for another reason.
        try:
            found = gather(reason.encode(errors="backslashreplace"), "reasons against a window")
        finally:
            self.give_up()
        return None, next(text.decode() for text in found if text)

    def _open(self, window: Window, cards: Sequence[bytes], spin_us: float) -> str:
        """Map the peers' pages, and publish whether that has worked; if not, return why."""
        sync, outcome, reason = None, _OPENED, ""
        try:
            window.open(cards, spin_us)
            sync = window.sync
        except SharedMemoryError as error:
            # In this rank's own page, which is all that it is sure to have. Nobody is woken: the others look again.
            native: Any = library.built
            sync, outcome, reason = native.NodeSync(0, [window.page], 0.0), _FAILED, str(error)
        sync.publish(outcome, NOWHERE, 0, 0, 0)
        return reason

    def give_up(self) -> None:
        """Close what was made."""
        if self._made is not None:
            self._made.close()
            self._made = None


def open_together(
    local_rank: int, size: int, spin_us: float, gather: Gather, wait: Callable[[Window], None]
) -> tuple[Window | None, str]:
    """The window of ``size`` ranks, or None on all of them, and why. Collective over them; the arguments are those of
    :class:`Opening` and :meth:`Opening.conclude`."""
    opening = Opening(local_rank, size)
    cards = gather(opening.card, "window cards, or reasons against a window")
    return opening.conclude(cards, spin_us, gather, wait)
