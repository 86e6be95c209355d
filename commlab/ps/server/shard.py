"""A server's shard: the values that it owns, flat, and the optimizer that updates them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from ...chunks import Range
from ...errors import UsageError
from ..placement import Part, Placement

Factory: TypeAlias = Callable[[Any], torch.optim.Optimizer]
"""Given a list of flat tensors (where the store has several groups: a list of ``{"params": [...]}``), makes the
optimizer that updates them."""
Hyper: TypeAlias = Sequence[Mapping[str, Any]]
"""Hyper-parameters of each group of the optimizer."""


class Own(NamedTuple):
    """A part of the tensor ``name`` as its owner has it. A factory with a method ``on_parts`` is given these, instead
    of being called with tensors that say nothing of where they come from."""

    name: str
    part: Part
    tensor: torch.Tensor


class Shard:
    """Parts ``0 .. len(parts) - 1`` of one server. ``factory`` None: an update is added to the value."""

    def __init__(self, placement: Placement, server: int, factory: Factory | None, groups: int = 1):
        self.parts = placement.of_server[server]
        self.dtypes = [placement.entries[part.entry].dtype for part in self.parts]
        self.names = [placement.entries[part.entry].name for part in self.parts]
        numel: dict[torch.dtype, int] = {}
        for part, dtype in zip(self.parts, self.dtypes, strict=True):
            numel[dtype] = part.offset + part.numel
        self.numel = numel
        self.values = {dtype: torch.zeros(count, dtype=dtype) for dtype, count in numel.items()}
        self.pieces: list[torch.Tensor] = []
        self._members: list[list[int]] = [[] for _ in range(groups)]
        for part, dtype in zip(self.parts, self.dtypes, strict=True):
            piece = self.values[dtype][part.offset : part.offset + part.numel]
            entry = placement.entries[part.entry]
            # So that its state has no dimension either, like that of the whole.
            self.pieces.append(piece if entry.shape else piece.view(()))
            self._members[entry.group].append(part.number)
        self.optimizer: torch.optim.Optimizer | None = None
        if factory is not None and self.parts:
            self.optimizer = self._make_optimizer(factory)
            # It may have groups in which no server has anything.
            self._members += [[] for _ in range(len(self.optimizer.param_groups) - groups)]

    def _make_optimizer(self, factory: Factory) -> torch.optim.Optimizer:
        on_parts: Any = getattr(factory, "on_parts", None)
        if on_parts is not None:
            own = [Own(*these) for these in zip(self.names, self.parts, self.pieces, strict=True)]
            made: torch.optim.Optimizer = on_parts(own)
            return made
        if len(self._members) == 1:
            return factory(self.pieces)
        return factory([{"params": [self.pieces[index] for index in members]} for members in self._members])

    def run(self, first: int, count: int) -> tuple[torch.dtype, Range] | None:
        """Where parts ``first .. first + count - 1`` lie in their flat tensor; None where there are no such parts, or
        they don't adjoin."""
        if count < 1 or first + count > len(self.parts):
            return None
        dtypes = set(self.dtypes[first : first + count])
        if len(dtypes) > 1:
            return None
        last = self.parts[first + count - 1]
        return dtypes.pop(), Range(self.parts[first].offset, last.offset + last.numel)

    def update(self, gradients: Mapping[int, torch.Tensor], hyper: Hyper | None) -> None:
        """Update the parts in ``gradients`` (1-D, of the parts' dtypes), and no others."""
        if self.optimizer is None:
            for index, gradient in gradients.items():
                self.pieces[index].add_(gradient.view(self.pieces[index].shape))
            return
        groups = self.optimizer.param_groups
        if hyper is not None:
            for entry, values in zip(groups, hyper, strict=True):
                entry.update(values)
        everything = [entry["params"] for entry in groups]
        # Looking at the parts without a gradient would cost more than the update of one.
        for entry, members in zip(groups, self._touched(gradients), strict=True):
            entry["params"] = [self.pieces[index] for index in members]
        for index, gradient in gradients.items():
            self.pieces[index].grad = gradient.view(self.pieces[index].shape)
        try:
            self.optimizer.step()
        finally:
            for entry, params in zip(groups, everything, strict=True):
                entry["params"] = params
            for index in gradients:
                self.pieces[index].grad = None

    def state(self, part: int) -> dict[str, Any]:
        """What the optimizer remembers of a part. UsageError where :meth:`set_state` could not take it."""
        found = {} if self.optimizer is None else dict(self.optimizer.state.get(self.pieces[part], {}))
        self._require_of_part(part, found)
        return found

    def set_state(self, part: int, state: dict[str, Any]) -> None:
        """UsageError where it is not of such a part."""
        if self.optimizer is not None:
            self._require_of_part(part, state)
            self.optimizer.state[self.pieces[part]] = state
        elif state:
            raise UsageError("there is no optimizer on this server that could have a state")

    def _require_of_part(self, part: int, state: dict[str, Any]) -> None:
        """An element-wise optimizer remembers something of every number, or one thing for all."""
        piece = self.pieces[part]
        for key, value in state.items():
            if torch.is_tensor(value) and value.dim() and value.shape != piece.shape:
                raise UsageError(
                    f"the optimizer's {key!r} has shape {list(value.shape)}, and its part of {self.names[part]!r} "
                    f"{list(piece.shape)}"
                )

    def _touched(self, indices: Iterable[int]) -> list[list[int]]:
        if len(self._members) == 1:
            return [sorted(indices)]
        wanted = set(indices)
        return [[index for index in members if index in wanted] for members in self._members]
