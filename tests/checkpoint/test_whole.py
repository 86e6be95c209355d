"""The optimizer's state, whole again on every rank out of the pieces of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crew import Crew, crew_of, groups

from commlab.checkpoint.pieces import Piece, state
from commlab.checkpoint.whole import give_back, whole_states
from commlab.errors import UsageError
from commlab.gradients.parameters import NamedParameter

SIZE = 3


crew = crew_of(SIZE)


def numbers(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(count).mul(7).remainder(251).to(dtype)


CUTS = {
    "one owner": [[(0, 13)], [], []],
    "a chunk each": [[(0, 4)], [(4, 9)], [(9, 13)]],
    "in any order": [[(9, 11), (0, 2)], [(2, 9)], [(11, 13)]],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.int64])
def test_state_of_any_dtype_comes_back(crew: Crew, cut: list[list[tuple[int, int]]], dtype: torch.dtype) -> None:
    """A13: numbers by range; step counters, texts and tuples once for all."""
    of_rank, whole = groups(SIZE), numbers(13, dtype)

    def run(rank: int) -> None:
        parameter = torch.nn.Parameter(torch.zeros(13))
        item = NamedParameter("w", parameter, 0, 0)
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        pieces = [Piece(item, start, stop, torch.zeros(stop - start)) for start, stop in cut[rank]]
        optimizer.param_groups[0]["params"] = [piece.tensor for piece in pieces]
        for piece in pieces:
            optimizer.state[piece.tensor] = {
                "step": torch.tensor(5.0),
                "seen": whole[piece.start : piece.stop].clone(),
                "betas": (0.5, 0.25),
                "kind": "text",
                "nothing": None,
            }
        give_back(of_rank[rank], optimizer, pieces, [item], [[parameter]], sharded=True)
        assert list(optimizer.state) == [parameter] and optimizer.param_groups[0]["params"] == [parameter]
        found = optimizer.state[parameter]
        assert torch.equal(found["seen"], whole) and found["seen"].dtype == dtype
        assert found["step"].item() == 5 and found["step"].shape == ()
        assert (found["betas"], found["kind"], found["nothing"]) == ((0.5, 0.25), "text", None)

    crew.all(run)


def test_state_that_some_ranks_have_alone_is_not_used(crew: Crew) -> None:
    """A13, A4: loaded on rank 1 alone; close() ends, and no step is made with half of a state."""
    of_rank = groups(SIZE)

    def run(rank: int) -> None:
        parameter = torch.nn.Parameter(torch.zeros(6))
        item = NamedParameter("w", parameter, 0, 0)
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        piece = Piece(item, 2 * rank, 2 * rank + 2, torch.zeros(2))
        optimizer.param_groups[0]["params"] = [piece.tensor]
        if rank == 1:
            optimizer.state[piece.tensor] = {"momentum_buffer": torch.ones(2)}
        give_back(of_rank[rank], optimizer, [piece], [item], [[parameter]], sharded=True)
        assert not optimizer.state
        with pytest.raises(UsageError, match="'w' the ranks' optimizers remembered different things"):
            optimizer.step()

    crew.all(run)


def test_what_cannot_travel_is_refused_on_all_ranks(crew: Crew) -> None:
    """A13: an object of the user's own in the state."""
    of_rank = groups(SIZE)

    def run(rank: int) -> None:
        item = NamedParameter("w", torch.nn.Parameter(torch.zeros(2)), 0, 0)
        own: dict[str, Any] = {"w": [{"start": 0, "stop": 2, "numel": 2, "state": {"mine": object()}}]} if rank else {}
        with pytest.raises(UsageError, match=r"cannot hold state.*'mine'.*a object.*on ranks 1, 2 of 3"):
            list(whole_states(of_rank[rank], own, [item]))

    crew.all(run)


def test_whole_parameters_stay_as_they_are() -> None:
    """A13: where every rank updates everything, nothing is done."""
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    item = NamedParameter("w", parameter, 0, 0)
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9)
    kept = optimizer.state[parameter] = {"momentum_buffer": torch.ones(2, 3)}
    give_back(groups(1)[0], optimizer, [Piece(item, 0, 6, parameter)], [item], [[parameter]], sharded=False)
    assert optimizer.state[parameter] is kept
    assert "frozen" not in state([Piece(item, 0, 6, parameter)], optimizer)
