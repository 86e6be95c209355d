"""Works that torch does not keep while C++ waits for them are kept by their group."""

from __future__ import annotations

from datetime import timedelta

import pytest

from commlab.c10d.work import CommlabWork, Futures, Kept
from commlab.errors import PeerTimeoutError
from commlab.runtime.handle import Handle


class NeverDriven:
    """Moves nothing on."""

    def poll(self) -> None: ...

    def drive(self, handle: Handle, timeout_s: float | None) -> None:
        raise PeerTimeoutError("nobody comes")


def started(kept: Kept) -> tuple[CommlabWork, Handle]:
    handle = Handle(NeverDriven(), lambda: "an operation", None)
    work = CommlabWork(Futures(threaded=False), (handle,), None)
    kept.keep(work)
    return work, handle


def test_until_they_are_waited_for_or_their_future_is_asked_for() -> None:
    kept = Kept()
    (waited, first), (asked, second), (late, _) = (started(kept) for _ in range(3))
    assert len(kept) == 3
    first.finish()
    second.finish()
    assert waited.wait() and len(kept) == 2
    asked.get_future()
    assert len(kept) == 1
    with pytest.raises(PeerTimeoutError):
        late.wait(timedelta(seconds=0.01))
    assert len(kept) == 0, "whoever waits holds it"


def test_of_those_that_ended_unasked_the_last_ones() -> None:
    """None that is still under way is let go, however many follow it."""
    kept = Kept(limit=3)
    under_way = [started(kept) for _ in range(5)]
    assert len(kept) == 5
    for _, handle in under_way:
        handle.finish()
    for _ in range(3):
        _, handle = started(kept)
        handle.finish()
    assert len(kept) == 5, "one goes for each that comes"
    assert all(work.kept is None for work, _ in under_way[:3]) and under_way[3][0].kept is kept
