"""Parameter servers whose ranks are threads of one process, on a simulated network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from crew import Crew, SharedNetwork

from commlab.job.topology import Topology
from commlab.ps.store import ParameterServer
from commlab.runtime.group import Group
from commlab.transport.sim import SimTransport


class SplitTransport(SimTransport):
    """One whose ranks can be split, each split a network of its own."""

    def __init__(self, network: SharedNetwork, rank: int, family: dict[Any, SharedNetwork], lock: threading.Lock):
        super().__init__(network, rank)
        self._family, self._lock, self._splits = family, lock, 0

    def split(self, ranks: Sequence[int], *_: Any, **__: Any) -> SplitTransport | None:
        self._splits += 1
        if self.rank not in ranks:
            return None
        with self._lock:
            key = id(self._network), self._splits
            network = self._family.setdefault(key, SharedNetwork(len(ranks)))
        return SplitTransport(network, list(ranks).index(self.rank), self._family, self._lock)


def groups(size: int, timeout_s: float = 300.0) -> list[Group]:
    """A group for each rank, in which stores can be built."""
    network, family, lock = SharedNetwork(size), {}, threading.Lock()  # type: ignore[var-annotated]
    everyone = Topology((tuple(range(size)),))
    return [Group(SplitTransport(network, rank, family, lock), everyone, timeout_s) for rank in range(size)]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5, momentum=0.5)


def play(
    size: int,
    script: Callable[[ParameterServer, int], Any],
    *arguments: Any,
    timeout_s: float = 300.0,
    **options: Any,
) -> list[Any]:
    """Build a store of ``arguments`` and ``options`` on ``size`` ranks, and run ``script(store, worker)`` on every
    worker; the results of the workers. A worker's store is closed at its end."""

    def rank_of(rank: int) -> Any:
        store = ParameterServer(*arguments, group=everyone[rank], **options)
        if store.role == "server":
            return None
        try:
            return script(store, store.group.rank)
        finally:
            store.close()

    everyone, crew = groups(size, timeout_s), Crew(size)
    try:
        results = crew.all(rank_of)
    finally:
        crew.close()
    servers = options.get("servers") or 1
    return results[: size - servers]
