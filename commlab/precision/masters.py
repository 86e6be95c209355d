"""Masters: the tensors that the optimizer updates. They are the parameters themselves, or under precision apex fp32
copies of parameters that are in 16 bits.

    in every precision   1. the gradient, multiplied by a factor (clipping, 1 / loss scale)
                         2. the optimizer's step on the masters
    fp32 copies          3. masters -> parameters

A rank updates whole parameters, or *pieces* of them (:mod:`commlab.checkpoint.pieces`), each through a tensor of its
own. Nothing here asks whether the gradient is finite: an inf or NaN in it makes the sum of its squares one, and ranks
have agreed on that sum before anybody updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..apex import Apex
from ..checkpoint.pieces import MASTER, Piece, parameter_of, rebind, whole
from ..gradients.parameters import NamedParameter
from ..job.dynamo import uncompiled
from ..native.norm import scale_

_LEAST = 1e-37
"""Above this a number and its inverse are normal fp32 numbers."""


class Masters(Protocol):
    """What an optimizer updates for the parameters of a model. Before the first step a rank says what it owns, by one
    call of :meth:`own_all` or :meth:`own`."""

    pieces: list[Piece]
    """What this rank's optimizer updates, each piece with the tensor that the optimizer has for it."""
    instead: str
    """Why parameters that somebody else has written would be overwritten; empty where they are the masters."""

    def own_all(self) -> None:
        """This rank updates all parameters, whole."""

    def own(self, pieces: Sequence[Piece]) -> None:
        """This rank updates ``pieces`` alone, which are views of their parameters; the optimizer is given their
        masters."""

    def step(self, factor: float) -> None:
        """Multiply the gradients that the parameters have (``p.grad``) by ``factor``, and update. For who owns all."""

    def step_pieces(self, gradients: Sequence[torch.Tensor | None], factor: float) -> None:
        """Multiply ``gradients`` by ``factor``, and update: 1-D and on the CPU, one for each of :attr:`pieces`, as they
        were reduced; they may be written. None: the piece is passed over."""

    def follow(self) -> None:
        """Take the new value of parameters that somebody else has written."""

    def replan(self, parameters: Sequence[NamedParameter]) -> None:
        """From now on ``parameters`` are trained. The optimizer has whole parameters again
        (:func:`commlab.checkpoint.whole.give_back`); what this rank owns is said anew."""


class InPlaceMasters:
    """Parameters that are their own masters. Gradients of 16 bits are multiplied in fp32: a wire's sums must not be
    rounded a second time before they reach the parameter's dtype."""

    instead = ""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[NamedParameter]):
        self._optimizer, self._parameters = optimizer, parameters
        self.pieces: list[Piece] = []

    def own_all(self) -> None:
        self.pieces = [whole(item) for item in self._parameters]

    def own(self, pieces: Sequence[Piece]) -> None:
        self.pieces = list(pieces)
        rebind(self._optimizer, self.pieces, self._parameters)

    def step(self, factor: float) -> None:
        scale_([item.tensor.grad for item in self._parameters if item.tensor.grad is not None], factor)
        uncompiled(self._optimizer.step)

    def step_pieces(self, gradients: Sequence[torch.Tensor | None], factor: float) -> None:
        present = [gradient for gradient in gradients if gradient is not None]
        # A fused optimizer divides by a scale as it goes, which saves a pass over the gradient.
        divides = factor != 1.0 and getattr(self._optimizer, "_step_supports_amp_scaling", False)
        # The scale is an fp32 number: the inverse of 0, which an infinite norm gives, is none.
        divides = divides and _LEAST < abs(factor) < 1 / _LEAST
        divides = divides and all(gradient.dtype is torch.float32 for gradient in present)
        multiplies = factor != 1.0 and not divides
        if multiplies:
            scale_([gradient for gradient in present if gradient.element_size() > 2], factor)
        for piece, gradient in zip(self.pieces, gradients, strict=True):
            master = piece.tensor
            if gradient is None:
                master.grad = None
                continue
            if multiplies and gradient.element_size() == 2:
                gradient = gradient.float() * factor
            master.grad = gradient.to(master.device, master.dtype).view(master.shape)
        if divides:
            device = self._parameters[0].tensor.device
            self._optimizer.grad_scale = torch.tensor(1.0 / factor, dtype=torch.float32, device=device)  # type: ignore[attr-defined]
        try:
            uncompiled(self._optimizer.step)
        finally:
            if divides:
                del self._optimizer.grad_scale  # type: ignore[attr-defined]
        for piece in self.pieces:
            piece.tensor.grad = None

    def follow(self) -> None:
        """Nothing to do: the parameters are the masters."""

    def replan(self, parameters: Sequence[NamedParameter]) -> None:
        self._parameters, self.pieces = parameters, []


class Fp32Masters:
    """fp32 copies of parameters that are in 16 bits, updated by Apex's optimizer. Apex's kernel multiplies gradients on
    their way to the masters, and rounds masters on their way to the parameters."""

    instead = "the next step overwrites it from the parameter's fp32 master"

    def __init__(
        self,
        apex: Apex,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[NamedParameter],
        copies: Sequence[torch.Tensor],
    ):
        """``copies``: of the parameters, in fp32, from before they were rounded; contiguous."""
        self._apex, self._optimizer, self._parameters = apex, optimizer, parameters
        self._whole = [Piece(item, 0, item.tensor.numel(), copy) for item, copy in zip(parameters, copies, strict=True)]
        self.pieces: list[Piece] = []

    def own_all(self) -> None:
        self._take(self._whole)

    def own(self, pieces: Sequence[Piece]) -> None:
        whole = {piece.parameter.index: piece.tensor.view(-1) for piece in self._whole}
        self._take(
            [
                piece._replace(
                    tensor=whole[piece.parameter.index][piece.start : piece.stop].clone().view(piece.tensor.shape)
                )
                for piece in pieces
            ]
        )

    def _take(self, pieces: list[Piece]) -> None:
        self.pieces, self._whole = pieces, []
        rebind(self._optimizer, pieces, self._parameters)

    def step(self, factor: float) -> None:
        self._step([piece.parameter.tensor.grad for piece in self.pieces], factor)

    def step_pieces(self, gradients: Sequence[torch.Tensor | None], factor: float) -> None:
        masters = [piece.tensor for piece in self.pieces]
        self._step(
            [
                None if gradient is None else gradient.to(master.device).view(master.shape)
                for master, gradient in zip(masters, gradients, strict=True)
            ],
            factor,
        )

    def _step(self, gradients: Sequence[torch.Tensor | None], factor: float) -> None:
        masters = [piece.tensor for piece in self.pieces]
        sources, targets = [], []
        for master, gradient in zip(masters, gradients, strict=True):
            if gradient is not None:
                master.grad = torch.empty_like(master)
                sources.append(gradient)
                targets.append(master.grad)
        self._apex.scale(sources, targets, factor)
        uncompiled(self._optimizer.step)
        for master in masters:
            master.grad = None
        self._apex.scale(masters, [parameter_of(piece) for piece in self.pieces], 1.0)

    def follow(self) -> None:
        """A master whose parameter still has its value keeps the bits that 16 have no room for."""
        for piece in self.pieces:
            parameter = parameter_of(piece)
            changed = piece.tensor.to(parameter.dtype) != parameter
            piece.tensor.copy_(torch.where(changed, parameter.float(), piece.tensor))

    def replan(self, parameters: Sequence[NamedParameter]) -> None:
        self._parameters, self.pieces = parameters, []
        masters = [master_of(item, self._optimizer) for item in parameters]
        self._whole = [whole(item)._replace(tensor=master) for item, master in zip(parameters, masters, strict=True)]


def master_of(item: NamedParameter, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """An fp32 copy of a parameter, contiguous. A master that an engine has left with the optimizer, and whose parameter
    still has its value, keeps the bits that 16 have no room for."""
    parameter = item.tensor.detach()
    left = optimizer.state.get(item.tensor, {}).get(MASTER)
    if left is not None and torch.equal(left.view(parameter.shape).to(parameter.dtype), parameter):
        parameter = left.view(parameter.shape)
    return parameter.float().contiguous().clone()
