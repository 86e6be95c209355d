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
"""The most requests of a worker that are not answered."""


class UsersOptimizer:
    """A factory for the store: the user's own optimizer, with its groups, hyper-parameters, schedulers and state, on
    the servers' tensors."""

    def __init__(self, optimizer: torch.optim.Optimizer, named: Sequence[NamedParameter]):
        self._optimizer, self._named = optimizer, {item.name: item for item in named}

    def __call__(self, groups: Any) -> torch.optim.Optimizer:
        tensors = [group["params"] for group in groups] if isinstance(groups[0], dict) else [groups]
        for at, entry in enumerate(self._optimizer.param_groups):
            entry["params"] = tensors[at] if at < len(tensors) else []
        return self._optimizer

    def on_slices(self, slices: Sequence[OwnedSlice]) -> torch.optim.Optimizer:
        own = [pieces.Piece(self._named[name], start, stop, tensor) for name, start, stop, tensor in slices]
        pieces.rebind(self._optimizer, own, self._named.values())
        return self._optimizer


def share(store: ParameterServer, rank: int, size: int) -> list[Slice]:
    """The slices that one of the workers saves and restores: they share the work."""
    everything = [each for slices in store.placement.of_server for each in slices]
    return everything[rank::size]


def state(store: ParameterServer, slices: Sequence[Slice], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """:func:`commlab.checkpoint.pieces.state` of ``slices``, from the servers; hyper-parameters are the workers'."""
    saved: dict[str, list[dict[str, Any]]] = {}
    requests = (store.optimizer_state(each) for each in slices)
    for each, found in zip(slices, _few_at_a_time(requests), strict=True):
        entry = store.placement.entries[each.entry]
        described = {"numel": entry.numel, "shape": list(entry.shape), "group": entry.group, "dtype": str(entry.dtype)}
        piece = {"start": each.start, "stop": each.stop, **described, "state": found}
        saved.setdefault(entry.name, []).append(piece)
    return {**pieces.about(optimizer), "pieces": saved}


def collect(
    store: ParameterServer,
    slices: Sequence[Slice],
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[NamedParameter],
    saved: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The state of each slice, out of what any strategy saved, on any ranks. Changes nothing."""
    named = {item.name: item for item in parameters}
    wanted = []
    for each in slices:
        entry = store.placement.entries[each.entry]
        stand_in = torch.empty((each.numel,) if entry.shape else (), dtype=entry.dtype, device="cpu")
        wanted.append(pieces.Piece(named[entry.name], each.start, each.stop, stand_in))
    found = [state for _, state in pieces.collect(wanted, optimizer, saved)]
    for state in found:
        state.pop(pieces.MASTER, None)
    return found


def assign(store: ParameterServer, slices: Sequence[Slice], states: Sequence[dict[str, Any]]) -> None:
    """Give the servers the states that :func:`collect` found."""
    requests = (store.set_optimizer_state(each, state) for each, state in zip(slices, states, strict=True))
    for _ in _few_at_a_time(requests):
        pass


def _few_at_a_time(requests: Iterable[Handle]) -> Iterator[Any]:
    """The results of ``requests``, in order. Each request is made when an earlier one is answered: it holds a copy of a
    slice's state on both sides."""
    under_way: deque[Handle] = deque()
    for request in requests:
        under_way.append(request)
        if len(under_way) == UNDER_WAY:
            yield under_way.popleft().wait()
    while under_way:
        yield under_way.popleft().wait()
