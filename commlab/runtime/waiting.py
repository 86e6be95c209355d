"""How to wait."""

from __future__ import annotations

import os
import time

WARN_AFTER_S = 10.0


SPIN_S = 2e-3
"""So long it is asked again at once: the fastest way to wait. (Asleep after 20 us, 64 KB took 4 ranks on 2 cores twice
as long.)"""


def pause(idle_s: float, spin_s: float = SPIN_S) -> None:
    """Wait a little, having waited ``idle_s`` already. For ``spin_s`` only offer the core to others: the peer that is
    waited for may want it, also where nobody can see that (hosts that are containers of one machine; without the offer
    4 B took 4 such hosts on 2 cores 3.9 ms instead of 1.8). Then sleep a tenth of what was waited already: late by 10 %
    at most, and a long wait costs nothing."""
    if idle_s < spin_s:
        os.sched_yield()
    else:
        time.sleep(min(1e-3, max(20e-6, idle_s / 10)))


_MOVING_S = 5e-3


def spin_s(crowded: bool, moving: bool) -> float:
    """How long to look again at once. Not for long where ranks share cores; longer with bytes under way (``moving``):
    each look may move a piece of them without ending anything."""
    return _MOVING_S if moving else 200e-6 if crowded else SPIN_S
