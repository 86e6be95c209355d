"""The user's optimizer on dedicated servers: it runs there, and workers save and restore what it remembers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..checkpoint import pieces
from ..gradients.parameters import NamedParameter
from ..ps.placement import Slice
from ..ps.server.shard import OwnedSlice
from ..ps.store import ParameterServer
from ..runtime.handle import Handle

UNDER_WAY = 4
"""Requests of a worker that are not answered."""


class UsersOwn:
    """The user's own optimizer, with its groups, hyper-parameters, schedulers and state, on other tensors."""

    def __init__(self, optimizer: torch.optim.Optimizer, named: Sequence[NamedParameter]):
        self._optimizer, self._named = optimizer, {item.name: item for item in named}

    def __call__(self, groups: Any) -> torch.optim.Optimizer:
        tensors = [group["params"] for group in groups] if isinstance(groups[0], dict) else [groups]
        for at, entry in enumerate(self._optimizer.param_groups):
            entry["params"] = tensors[at] if at < len(tensors) else []
        return self._optimizer

    def on_slices(self, slices: Sequence[OwnedSlice]) -> torch.optim.Optimizer:
        own = [pieces.Piece(self._named[name], start, stop, tensor) for name, start, stop, tensor in slices]
        pieces.rebind(self._optimizer, own)
        return self._optimizer


def share(store: ParameterServer, rank: int, size: int) -> list[Slice]:
    """What one of the workers saves and restores: they share the work."""
    everything = [part for parts in store.placement.of_server for part in parts]
    return everything[rank::size]


def state(store: ParameterServer, parts: Sequence[Slice], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """:func:`.pieces.state` of ``parts``, from the servers; hyper-parameters are the workers'."""
    saved: dict[str, list[dict[str, Any]]] = {}
    asked = (store.optimizer_state(part) for part in parts)
    for part, found in zip(parts, _few_at_a_time(asked), strict=True):
        entry = store.placement.entries[part.entry]
        own = {"start": part.start, "stop": part.stop, "numel": entry.numel, "state": found}
        saved.setdefault(entry.name, []).append(own)
    return {"groups": pieces.groups_of(optimizer), "pieces": saved}


def collect(
    store: ParameterServer,
    parts: Sequence[Slice],
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[NamedParameter],
    saved: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The state of each part, out of what any strategy saved, on any ranks. Changes nothing."""
    named = {item.name: item for item in parameters}
    wanted = []
    for part in parts:
        entry = store.placement.entries[part.entry]
        stand_in = torch.empty((part.numel,) if entry.shape else (), dtype=entry.dtype)
        wanted.append(pieces.Piece(named[entry.name], part.start, part.stop, stand_in))
    found = [state for _, state in pieces.collect(wanted, optimizer, saved)]
    for state in found:
        state.pop(pieces.MASTER, None)
    return found


def tell(store: ParameterServer, parts: Sequence[Slice], states: Sequence[dict[str, Any]]) -> None:
    """Give the servers what :func:`collect` found."""
    told = (store.set_optimizer_state(part, state) for part, state in zip(parts, states, strict=True))
    for _ in _few_at_a_time(told):
        pass


def _few_at_a_time(handles: Iterable[Handle]) -> Iterator[Any]:
    """Their results, in order. Requests are made as it goes: each holds a copy of its part's state on both sides."""
    under_way: deque[Handle] = deque()
    for handle in handles:
        under_way.append(handle)
        if len(under_way) == UNDER_WAY:
            yield under_way.popleft().wait()
    while under_way:
        yield under_way.popleft().wait()
