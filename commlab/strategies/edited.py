"""The reduced gradient of what a rank owns, while the user may edit it: ``engine.reduced_gradients()`` under strategies
whose ranks have different shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checkpoint.pieces import Piece
from ..chunks import split
from ..native.norm import norm_squared
from ..runtime.group import Group
from .copies import require_alike
from .reduced import ReducedGradient
from .start import Training

_REMEDY = (
    "Nothing was updated. Every node updates all parameters: edit the reduced gradient alike on all ranks (draw random "
    "numbers by piece.draw()), or clip by max_grad_norm="
)


def counted(across: Group | None, numbers: torch.Tensor) -> torch.Tensor:
    """The part of this rank's ``numbers`` whose squares it answers for: all, or where every node has them, its share
    ``across`` the nodes, so that each is counted once."""
    if across is None:
        return numbers
    flat = numbers.reshape(-1)
    own = split(flat.numel(), across.size)[across.rank]
    return flat[own.start : own.stop]


class EditedGradients:
    """``gradients``: one for each of the masters' pieces, flat; None where the parameter has none."""

    def __init__(self, training: Training, gradients: Sequence[torch.Tensor | None]):
        self._training = training
        # In fp32 at least: edits must not be rounded to the wire's 16 bits.
        self.tensors = [
            gradient if gradient is None or gradient.element_size() > 2 else gradient.float() for gradient in gradients
        ]

    def _present(self) -> list[tuple[Piece, torch.Tensor]]:
        pieces = self._training.masters.pieces
        return [(piece, each) for piece, each in zip(pieces, self.tensors, strict=True) if each is not None]

    def pieces(self, scale: float) -> list[ReducedGradient]:
        """What the user is given; the gradients are multiplied by ``scale``."""
        replicated, step = self._training.across is not None, self._training.steps
        return [
            ReducedGradient.of(piece.parameter, piece.start, piece.stop, gradient, scale, replicated, step)
            for piece, gradient in self._present()
        ]

    def squares(self) -> float:
        """This rank's part of the sum of squares over all ranks, of what the user has left."""
        return norm_squared(counted(self._training.across, gradient) for _, gradient in self._present())

    def require_alike(self) -> None:
        """DisagreementError, on all ranks, where nodes that all update the same have edited it in different ways.
        Collective. Cost: where that may be, a pass over what this rank owns, and one small exchange."""
        training = self._training
        if training.across is None:
            return
        copies = ((f"the reduced gradient of {piece.text}", gradient) for piece, gradient in self._present())
        local_ranks = training.group.topology.local_ranks
        require_alike(training.group, training.steps, copies, local_ranks=local_ranks, remedy=_REMEDY)
