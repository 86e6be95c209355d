"""Ranks that are threads of one process, on a simulated network: whole engines without mpirun."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from commlab.errors import PeerTimeoutError
from commlab.job.topology import Topology
from commlab.runtime.group import Group
from commlab.transport.base import Bytes
from commlab.transport.sim import SimNetwork, SimRequest

by_turns = threading.Lock()
"""For what ranks that are threads may not do at the same time: torch's random numbers are shared by them, and two
threads that compile the same class to TorchScript each define its methods ("Can't redefine method", one run of 12)."""


class SharedNetwork(SimNetwork):
    """For ranks that are threads."""

    def __init__(self, size: int):
        super().__init__(size)
        self._lock = threading.Lock()

    def post(self, frm: int, to: int, data: Bytes, sending: bool) -> SimRequest:
        with self._lock:
            return super().post(frm, to, data, sending)


class Crew:
    """A thread per rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._tasks: list[queue.SimpleQueue[Callable[[int], Any] | None]] = [
            queue.SimpleQueue() for _ in range(self.size)
        ]
        self._results: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, args=(rank,), daemon=True) for rank in range(size)]
        for thread in self._threads:
            thread.start()

    def _work(self, rank: int) -> None:
        while (task := self._tasks[rank].get()) is not None:
            try:
                self._results.put((rank, task(rank), None))
            except BaseException as error:
                self._results.put((rank, None, error))

    def all(self, task: Callable[[int], Any]) -> list[Any]:
        """``task(rank)`` on every rank; the results in rank order. Where some raise, the first error that isn't the
        wait for a rank that had raised before."""
        for tasks in self._tasks:
            tasks.put(task)
        found = sorted((self._results.get(timeout=60) for _ in range(self.size)), key=lambda each: each[0])
        errors = [error for _, _, error in found if error is not None]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, PeerTimeoutError))
        return [result for _, result, _ in found]

    def close(self) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        for thread in self._threads:
            thread.join(timeout=10)


def crew_of(size: int) -> Callable[[], Iterator[Crew]]:
    """The fixture ``crew`` of a module of tests: one crew for all of them."""

    @pytest.fixture(scope="module")
    def crew() -> Iterator[Crew]:
        made = Crew(size)
        yield made
        made.close()

    return crew


def groups(size: int) -> list[Group]:
    """A group for each rank, on a network of their own."""
    everyone = Topology((tuple(range(size)),))
    return [Group(transport, everyone, 30.0) for transport in SharedNetwork(size).transports()]
