"""A server's shard: the values that the server owns, flat, and the optimizer that updates them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from ...chunks import Range
from ...errors import UsageError
from ...job.dynamo import uncompiled
from ..placement import Placement

Factory: TypeAlias = Callable[[Any], torch.optim.Optimizer]
"""Given a list of flat tensors (where the store has several groups: a list of ``{"params": [...]}``), makes the
optimizer that updates them."""
GroupHypers: TypeAlias = Sequence[Mapping[str, Any]]
"""Hyper-parameters of each group of the optimizer."""


class OwnedSlice(NamedTuple):
    """Numbers ``start .. stop - 1`` of the tensor ``name``, and the tensor in which their owner has them. A factory
    with a method ``on_slices`` is given a list of these, instead of being called with tensors that do not tell where
    they come from."""

    name: str
    start: int
    stop: int
    tensor: torch.Tensor


class OwnedSpan(NamedTuple):
    """Slices ``first .. first + slices - 1``, which lie ``where`` in the flat tensor of ``dtype``."""

    first: int
    slices: int
    dtype: torch.dtype
    where: Range

    @property
    def indices(self) -> range:
        return range(self.first, self.first + self.slices)


class Shard:
    """Slices ``0 .. len(slices) - 1`` of one server. ``factory`` None: an update is added to the value."""

    def __init__(self, placement: Placement, server: int, factory: Factory | None, groups: int = 1):
        self.slices = placement.of_server[server]
        self.dtypes = [placement.entries[owned.entry].dtype for owned in self.slices]
        self.names = [placement.entries[owned.entry].name for owned in self.slices]
        """The name of each slice's tensor."""
        self.versions = [0] * len(self.slices)
        """How often each slice was written: its first value is the first time, and each update is one more."""
        self._stops = [owned.offset + owned.numel for owned in self.slices]
        """Where each slice ends in the flat tensor of its dtype."""
        numel = dict(zip(self.dtypes, self._stops, strict=True))
        self.numel = numel
        self.values = {dtype: torch.zeros(count, dtype=dtype, device="cpu") for dtype, count in numel.items()}
        self.pieces: list[torch.Tensor] = []
        """Each slice's numbers, as the optimizer updates them: a view of ``values``."""
        self._members: list[list[int]] = [[] for _ in range(groups)]
        for owned, dtype in zip(self.slices, self.dtypes, strict=True):
            piece = self.values[dtype][owned.offset : owned.offset + owned.numel]
            entry = placement.entries[owned.entry]
            # A number without dimensions stays one, so that its state has no dimension either, like the whole's.
            self.pieces.append(piece if entry.shape else piece.view(()))
            self._members[entry.group].append(owned.number)
        self.optimizer: torch.optim.Optimizer | None = None
        if factory is not None and self.slices:
            self.optimizer = self._make_optimizer(factory)
            # The optimizer may have groups in which no server has anything.
            self._members += [[] for _ in range(len(self.optimizer.param_groups) - groups)]

    def _make_optimizer(self, factory: Factory) -> torch.optim.Optimizer:
        on_slices: Any = getattr(factory, "on_slices", None)
        if on_slices is not None:
            slices = zip(self.names, self.slices, self.pieces, strict=True)
            made: torch.optim.Optimizer = on_slices(
                [OwnedSlice(name, owned.start, owned.stop, piece) for name, owned, piece in slices]
            )
            return made
        if len(self._members) == 1:
            return factory(self.pieces)
        return factory([{"params": [self.pieces[index] for index in members]} for members in self._members])

    def span(self, first: int, count: int) -> tuple[torch.dtype, Range] | None:
        """Where slices ``first .. first + count - 1`` lie in the flat tensor of their dtype; None where there are no
        such slices, or where they do not adjoin."""
        if count < 1 or first + count > len(self.slices):
            return None
        dtypes = set(self.dtypes[first : first + count])
        if len(dtypes) > 1:
            return None
        return dtypes.pop(), Range(self.slices[first].offset, self._stops[first + count - 1])

    def spans(self, indices: Iterable[int]) -> list[OwnedSpan]:
        """The slices ``indices``, ascending, those that adjoin and have one dtype together."""
        found: list[OwnedSpan] = []
        first = stop = -1
        for index in indices:
            if index != stop or self.dtypes[index] is not self.dtypes[first]:
                if stop > first:
                    found.append(self._span_from(first, stop))
                first = index
            stop = index + 1
        if stop > first:
            found.append(self._span_from(first, stop))
        return found

    def _span_from(self, first: int, stop: int) -> OwnedSpan:
        where = Range(self.slices[first].offset, self._stops[stop - 1])
        return OwnedSpan(first, stop - first, self.dtypes[first], where)

    def split(self, span: OwnedSpan, numbers: torch.Tensor) -> Sequence[torch.Tensor]:
        """``numbers`` of a span, 1-D, slice by slice."""
        if span.slices == 1:
            return (numbers,)
        found: Sequence[torch.Tensor] = numbers.split([self.slices[index].numel for index in span.indices])
        return found

    def has_values(self, first: int, count: int) -> bool:
        """Whether slices ``first .. first + count - 1`` have had their first values."""
        return all(self.versions[first : first + count])

    def assign(self, first: int, count: int, numbers: torch.Tensor) -> None:
        """Overwrite the values of slices ``first .. first + count - 1``, which adjoin."""
        span = self.span(first, count)
        assert span is not None
        dtype, where = span
        self.values[dtype][where.start : where.stop].copy_(numbers)
        for index in range(first, first + count):
            self.versions[index] += 1

    def update(
        self, gradients: Iterable[tuple[OwnedSpan, torch.Tensor]], hypers: GroupHypers | None, factor: float = 1.0
    ) -> None:
        """Update the slices of these spans, and no others, with gradients that are the numbers (1-D) times ``factor``.
        ``hypers``: the optimizer's hyper-parameters for this update; None: as they are."""
        exact = [(span, self._gradient(span, numbers, factor)) for span, numbers in gradients]
        for span, _ in exact:
            for index in span.indices:
                self.versions[index] += 1
        if self.optimizer is None:
            for span, numbers in exact:
                self.values[span.dtype][span.where.start : span.where.stop].add_(numbers)
            return
        groups = self.optimizer.param_groups
        if hypers is not None:
            for entry, values in zip(groups, hypers, strict=True):
                entry.update(values)
        everything = [entry["params"] for entry in groups]
        touched = [index for span, _ in exact for index in span.indices]
        # Looking at the slices without a gradient would cost more than the update of one slice.
        for entry, members in zip(groups, self._touched(touched), strict=True):
            entry["params"] = [self.pieces[index] for index in members]
        pieces = self.pieces
        for span, numbers in exact:
            for index, gradient in zip(span.indices, self.split(span, numbers), strict=True):
                piece = pieces[index]
                piece.grad = gradient if piece.dim() else gradient.view(())
        try:
            uncompiled(self.optimizer.step)
        finally:
            for entry, params in zip(groups, everything, strict=True):
                entry["params"] = params
            for index in touched:
                pieces[index].grad = None

    def _gradient(self, span: OwnedSpan, numbers: torch.Tensor, factor: float) -> torch.Tensor:
        """``numbers`` times ``factor``, in the dtype of the slices; 16-bit numbers are multiplied in fp32, so that they
        are rounded once."""
        if factor != 1.0:
            numbers = (numbers.float() if numbers.element_size() == 2 else numbers) * factor
        return numbers.to(span.dtype)

    def state(self, index: int) -> dict[str, Any]:
        """What the optimizer remembers of a slice. UsageError where :meth:`set_state` could not take the state."""
        found = {} if self.optimizer is None else dict(self.optimizer.state.get(self.pieces[index], {}))
        self._require_of_slice(index, found)
        return found

    def set_state(self, index: int, state: dict[str, Any]) -> None:
        """Let the optimizer remember ``state`` of a slice. UsageError for a state that is not of such a slice."""
        if self.optimizer is not None:
            self._require_of_slice(index, state)
            self.optimizer.state[self.pieces[index]] = state
        elif state:
            raise UsageError("there is no optimizer on this server that could have a state")

    def _require_of_slice(self, index: int, state: dict[str, Any]) -> None:
        """An element-wise optimizer remembers something of every number, or one thing for all."""
        piece = self.pieces[index]
        for key, value in state.items():
            if torch.is_tensor(value) and value.dim() and value.shape != piece.shape:
                raise UsageError(
                    f"the optimizer's {key!r} has shape {list(value.shape)}, and its part of {self.names[index]!r} "
                    f"{list(piece.shape)}"
                )

    def _touched(self, indices: Iterable[int]) -> list[list[int]]:
        """Those of the slices ``indices`` that are in each of the optimizer's groups."""
        if len(self._members) == 1:
            return [sorted(indices)]
        wanted = set(indices)
        return [[index for index in members if index in wanted] for members in self._members]
