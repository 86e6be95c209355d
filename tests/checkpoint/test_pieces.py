"""Optimizer state cut into pieces, saved, and put together for other owners: not a bit may change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlab.checkpoint.pieces import Piece, load, rebind, state
from commlab.chunks import Range
from commlab.errors import UsageError
from commlab.gradients.parameters import NamedParameter, named_parameters
from commlab.ps.elementwise import ELEMENTWISE, require_elementwise

SHAPES = ((4, 3), (), (1,), (7,), (2, 2, 2), (0, 2))
Ranges = Sequence[Range]


@dataclass
class Rank:
    """One rank's pieces of a model, and the optimizer that updates them."""

    parameters: list[NamedParameter]
    pieces: list[Piece]
    optimizer: torch.optim.Optimizer


def whole(kind: str, steps: int) -> Rank:
    """All of the model, updated ``steps`` times."""
    generator = torch.Generator().manual_seed(1)
    model = torch.nn.Module()
    for index, shape in enumerate(SHAPES):
        model.register_parameter(f"p{index}", torch.nn.Parameter(torch.randn(shape, generator=generator)))
    trained = list(model.parameters())
    make: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, kind)
    extra: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = make([{"params": trained[:3], "lr": 0.1}, {"params": trained[3:], "lr": 0.02}], **extra)
    parameters = named_parameters(model, optimizer)
    rank = Rank(parameters, [Piece(item, 0, item.tensor.numel(), item.tensor) for item in parameters], optimizer)
    for step in range(steps):
        update(rank, step)
    return rank


def cut(kind: str, ranges_of_rank: Ranges, steps: int) -> Rank:
    """This rank's part of the model: of every parameter (all numbers in one row) what lies inside the rank's ranges."""
    rank = whole(kind, steps)
    pieces, at = [], 0
    for item in rank.parameters:
        here = Range(at, at + item.tensor.numel())
        at = here.stop
        for owned in ranges_of_rank:
            common = here.intersect(owned)
            if common.numel:
                flat = item.tensor.detach().reshape(-1)[common.start - here.start : common.stop - here.start].clone()
                tensor = flat.view(()) if not item.tensor.dim() else flat
                pieces.append(Piece(item, common.start - here.start, common.stop - here.start, tensor))
    rebind(rank.optimizer, pieces)
    return Rank(rank.parameters, pieces, rank.optimizer)


def update(rank: Rank, step: int) -> None:
    """One optimizer step, with gradients that depend on the step and the place in the whole parameter only."""
    for piece in rank.pieces:
        generator = torch.Generator().manual_seed(100 * step + piece.parameter.index)
        gradient = torch.randn(piece.parameter.tensor.numel(), generator=generator)
        piece.tensor.grad = gradient[piece.start : piece.stop].view(piece.tensor.shape)
    rank.optimizer.step()
    for piece in rank.pieces:
        piece.tensor.grad = None


NUMEL = sum(torch.Size(shape).numel() for shape in SHAPES)


def owners(bounds: Sequence[int]) -> list[list[Range]]:
    """One rank for each part between the bounds."""
    edges = [0, *sorted(bounds), NUMEL]
    return [[Range(start, stop)] for start, stop in pairwise(edges)]


def assert_is_part_of(rank: Rank, reference: Rank) -> None:
    """Parameters, state and hyper-parameters are the reference's, bit for bit."""
    wholes = {item.name: item.tensor for item in reference.parameters}
    for piece in rank.pieces:
        if piece.stop == piece.start:
            continue
        tensor = wholes[piece.parameter.name]
        inside = slice(piece.start, piece.stop)
        assert torch.equal(piece.tensor.reshape(-1), tensor.detach().reshape(-1)[inside]), piece.parameter.name
        mine, theirs = rank.optimizer.state[piece.tensor], reference.optimizer.state[tensor]
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            found = mine[key]
            if not torch.is_tensor(value):
                assert found == value, key
            elif value.shape == tensor.shape and value.dim():
                assert found.shape == piece.tensor.shape
                assert torch.equal(found.reshape(-1), value.reshape(-1)[inside]), key
            else:
                assert found.shape == value.shape and torch.equal(found, value), key
    for mine, theirs in zip(rank.optimizer.param_groups, reference.optimizer.param_groups, strict=True):
        assert {**mine, "params": 0} == {**theirs, "params": 0}


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_every_listed_optimizer_is_elementwise(kind: str) -> None:
    reference = whole(kind, 4)
    covered = 0
    for ranges in owners([5, 5, 13, 17]):
        rank = cut(kind, ranges, 2)  # state that is there already is cut too
        for step in (2, 3):
            update(rank, step)
        assert_is_part_of(rank, reference)
        covered += sum(piece.tensor.numel() for piece in rank.pieces)
    assert covered == NUMEL


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_an_optimizer_without_pieces_steps(kind: str) -> None:
    rank = cut(kind, [], 1)
    assert rank.pieces == [] and not rank.optimizer.state
    update(rank, 1)
    assert [len(entry["params"]) for entry in rank.optimizer.param_groups] == [0, 0]


@settings(max_examples=30)
@given(
    before=st.lists(st.integers(0, NUMEL), max_size=5),
    after=st.lists(st.integers(0, NUMEL), max_size=5),
    kind=st.sampled_from(["AdamW", "SGD", "NAdam"]),
)
def test_state_survives_any_change_of_owners(before: list[int], after: list[int], kind: str) -> None:
    reference = whole(kind, 3)
    parts = []
    for ranges in owners(before):
        rank = cut(kind, ranges, 3)
        parts.append(copy.deepcopy(state(rank.pieces, rank.optimizer)))
    for ranges in owners(after):
        rank = cut(kind, ranges, 0)
        load(rank.pieces, rank.optimizer, parts[::-1])
        for piece in rank.pieces:
            tensor = next(item.tensor for item in reference.parameters if item.name == piece.parameter.name)
            piece.tensor.copy_(tensor.detach().reshape(-1)[piece.start : piece.stop].view(piece.tensor.shape))
        assert_is_part_of(rank, reference)


def test_whole_state_loads_from_pieces_and_from_everybodys_whole() -> None:
    reference = whole("AdamW", 3)
    cuts = [cut("AdamW", ranges, 3) for ranges in owners([4, 20])]
    for parts in (
        [state(rank.pieces, rank.optimizer) for rank in cuts],
        [state(reference.pieces, reference.optimizer)],
        [state(reference.pieces, reference.optimizer)] * 3,  # what three ranks of allreduce save
    ):
        fresh = whole("AdamW", 0)
        load(fresh.pieces, fresh.optimizer, parts)
        for mine, theirs in zip(fresh.parameters, reference.parameters, strict=True):
            mine.tensor.data.copy_(theirs.tensor)
        assert_is_part_of(fresh, reference)
        stepped = whole("AdamW", 4)
        update(fresh, 3)
        assert_is_part_of(fresh, stepped)


def test_loaded_state_is_a_copy() -> None:
    source, fresh = whole("AdamW", 2), whole("AdamW", 2)
    saved = state(source.pieces, source.optimizer)
    load(fresh.pieces, fresh.optimizer, [saved])
    before = copy.deepcopy(source.optimizer.state_dict())
    update(fresh, 2)
    fresh.optimizer.param_groups[0]["lr"] = 5.0
    after = source.optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, values in before["state"].items():
        for key, value in values.items():
            assert torch.equal(value, after["state"][index][key])


def test_state_of_a_turned_parameter_lies_in_memory_as_the_parameter_does() -> None:
    def build() -> Rank:
        model = torch.nn.Module()
        model.register_parameter("turned", torch.nn.Parameter(torch.arange(12.0).view(4, 3).t()))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        parameters = named_parameters(model, optimizer)
        return Rank(parameters, [Piece(parameters[0], 0, 12, parameters[0].tensor)], optimizer)

    reference, fresh = build(), build()
    gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).t()
    reference.pieces[0].tensor.grad = gradient.clone()
    reference.optimizer.step()
    load(fresh.pieces, fresh.optimizer, [state(reference.pieces, reference.optimizer)])
    fresh.pieces[0].tensor.data.copy_(reference.pieces[0].tensor)
    for rank in (reference, fresh):
        rank.pieces[0].tensor.grad = gradient.clone()
        rank.optimizer.step()
    # torch's fused loop ignores strides: with state in another order it would update with other numbers' moments.
    assert torch.equal(fresh.pieces[0].tensor, reference.pieces[0].tensor)


def saved_parts() -> list[dict[str, Any]]:
    return [state(rank.pieces, rank.optimizer) for rank in (cut("AdamW", ranges, 2) for ranges in owners([3, 16]))]


def without_middle(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [parts[0], parts[2]]


def without_all(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return []


def with_longer(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    parts[0]["pieces"]["p0"][0]["numel"] = 99
    return parts


def with_a_group_more(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**part, "groups": [*part["groups"], {"lr": 1.0}]} for part in parts]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            without_middle,
            r"'p0': this rank updates its numbers 0\.\.11, and number 3 has no saved state; load the parts of all",
        ),
        (without_all, "at least one part"),
        (with_longer, "'p0': saved with 99 numbers, the model has 12"),
        (with_a_group_more, "the saved optimizer has 3 groups, this one 2"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    spoil: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], message: str
) -> None:
    rank, twin = whole("AdamW", 1), whole("AdamW", 1)
    rank.optimizer.param_groups[0]["lr"] = twin.optimizer.param_groups[0]["lr"] = 0.7
    with pytest.raises(UsageError, match=message):
        load(rank.pieces, rank.optimizer, spoil(saved_parts()))
    assert_is_part_of(rank, twin)


class OwnSGD(torch.optim.SGD):
    """Of the user's own: its name says nothing."""


class SGD(torch.optim.Optimizer):
    """Not torch's, whatever it is called."""

    def __init__(self, params: Any):
        super().__init__(params, {})


def test_only_listed_optimizers_or_declared_ones_may_be_cut() -> None:
    parameter = [torch.nn.Parameter(torch.zeros(2, 2))]
    refused = [torch.optim.Adafactor(parameter), torch.optim.LBFGS(parameter), OwnSGD(parameter), SGD(parameter)]
    if hasattr(torch.optim, "Muon"):
        refused.append(torch.optim.Muon(parameter))
    for optimizer in refused:
        kind = type(optimizer).__name__
        with pytest.raises(UsageError, match=f"optimizer {kind} may need whole tensors.*elementwise=True.*allreduce"):
            require_elementwise(optimizer, None)
        require_elementwise(optimizer, True)
    require_elementwise(torch.optim.AdamW(parameter), None)
    with pytest.raises(UsageError, match="AdamW"):
        require_elementwise(torch.optim.AdamW(parameter), False)
