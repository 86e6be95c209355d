"""The thread that carries operations out while the program computes: one for each process, asleep when nothing is under
way. It alone touches the groups of the process sets, which are no other's, so no rank's threads are in each other's
order, and MPI is not called by it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from ..errors import UsageError
from ..runtime.group import Group
from ..runtime.waiting import pause
from . import perform
from .channel import Channel
from .settings import Settings
from .submission import HorovodInternalError, Submission

_BLOCK_S = 0.1
"""Back after so long: to see who is silent. Nothing that the program asks for meanwhile could begin sooner, as long as
there is one process set."""
_BLOCK_BESIDE_OTHERS_S = 1e-3
_INSPECT_S = 0.5
_DOZE_S, _DOZES = 0.25, 8
"""After an operation the thread looks so often, so long apart, whether there is something to do, before it sleeps until
it is called. Meanwhile nobody has to call it for the first tensors of a foreseen batch, only for the last one."""


class Background:
    """``channels``: by the number of the process set; 0 is the set of all ranks."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.channels: dict[int, Channel] = {}
        self._changed = threading.Condition(threading.Lock())
        self._signals = 0
        self._closed = False
        self._sound_asleep = False
        self.pid = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="commlab horovod", daemon=True)
        self._thread.start()

    def add(self, number: int, group: Group, ranks: Sequence[int]) -> None:
        """From now on operations of this process set are taken."""
        with self._changed:
            self.channels[number] = Channel(group, ranks, self.settings, perform)

    def remove(self, number: int) -> None:
        """End a process set; its ranks have agreed on that, and have nothing under way."""
        with self._changed:
            channel = self.channels.pop(number)
            waiting = list(channel.submissions)
            channel.ended = HorovodInternalError(f"rank {channel.rank}: process set {number} was removed")
        if waiting:
            raise HorovodInternalError(f"rank {channel.rank}: process set {number} was removed while {waiting} ran")
        channel.buffers.clear()
        channel.group.close()

    def submit(self, number: int, submissions: Sequence[Submission]) -> None:
        """Take operations of this rank; they travel in the order of their announcement on all ranks."""
        if os.getpid() != self.pid:
            raise UsageError("this process was forked from a rank, and is none itself")
        with self._changed:
            channel = self.channels.get(number)
            if channel is None:
                raise HorovodInternalError(f"process set {number} is not there: it was removed, or never made")
            wanted = False
            for submission in submissions:
                submission.started_ns = time.perf_counter_ns()
                wanted |= channel.submit(submission)
            if wanted or self._sound_asleep:
                self._signal()

    def urge(self, number: int, submission: Submission) -> None:
        """Somebody waits for this operation of this set."""
        channel = self.channels.get(number)
        if channel is not None:
            channel.waited = True
        submission.urgent = True
        if not submission.taken:
            with self._changed:
                self._signal()

    def join(self, submission: Submission) -> None:
        """This rank contributes nothing to the operations of the set of all ranks until all ranks have joined."""
        with self._changed:
            channel = self.channels[0]
            if channel.ended is not None:
                raise HorovodInternalError(str(channel.ended)) from channel.ended
            if channel.joining is not None:
                raise HorovodInternalError(f"rank {channel.rank}: another thread of this rank is in join()")
            channel.joining = submission
            self._signal()

    def close(self, why: str, wait_s: float) -> None:
        """Tell the others that this rank leaves, and end the thread. Waits up to ``wait_s`` for the others to hear
        it."""
        if os.getpid() != self.pid:
            return
        with self._changed:
            for channel in self.channels.values():
                channel.leaving = channel.leaving or why
            self._signal()
        stop_s = time.monotonic() + wait_s
        while time.monotonic() < stop_s and self._thread.is_alive():
            with self._changed:
                if all(channel.ended is not None for channel in self.channels.values()):
                    break
            time.sleep(1e-3)
        with self._changed:
            self._closed = True
            self._signal()
        self._thread.join(timeout=5)
        for channel in self.channels.values():
            orderly = channel.waits_for is None
            channel.fail(HorovodInternalError(f"rank {channel.rank} {why}"))
            channel.buffers.clear()
            if orderly or channel.group.size == 1:
                channel.group.close()

    def _signal(self) -> None:
        self._signals += 1
        self._changed.notify()

    def _serve(self) -> None:
        idle_since_s = inspected_s = time.monotonic()
        while not self._closed:
            seen = self._signals
            channels = list(self.channels.values())
            moved = False
            for channel in channels:
                moved |= channel.step()
            now_s = time.monotonic()
            if now_s - inspected_s > _INSPECT_S:
                inspected_s = now_s
                for channel in channels:
                    channel.inspect(now_s)
            if moved:
                idle_since_s = now_s
                continue
            self._rest(channels, seen, now_s, now_s - idle_since_s)

    def _rest(self, channels: Sequence[Channel], seen: int, now_s: float, idle_s: float) -> None:
        under_way = [channel for channel in channels if channel.waits_for is not None]
        if len(under_way) == 1:
            under_way[0].block(_BLOCK_S if len(channels) == 1 else _BLOCK_BESIDE_OTHERS_S, idle_s)
        elif under_way:
            pause(idle_s)
        else:
            with self._changed:
                if seen == self._signals and not self._closed:
                    pause_s = self._pause_of(channels, now_s)
                    if pause_s is None and idle_s < _DOZE_S * _DOZES:
                        pause_s = _DOZE_S
                    self._sound_asleep = pause_s is None
                    self._changed.wait(pause_s)
                    self._sound_asleep = False

    def _pause_of(self, channels: Sequence[Channel], now_s: float) -> float | None:
        """How long to sleep unless somebody calls; None: for ever."""
        wakes = [channel.wake_s for channel in channels if channel.wake_s is not None]
        pauses: list[Any] = [max(0.0, min(wakes) - now_s)] if wakes else []
        if any(channel.submissions for channel in channels):
            pauses.append(_INSPECT_S)
        return min(pauses) if pauses else None
