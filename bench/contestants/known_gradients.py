"""Gradients that are known without computing, and the parameters that steps with them must lead to."""

from __future__ import annotations

from typing import Any

import torch

from ..core.ranks import Ranks

LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, 0.01, 1.0
PERIOD = 31
"""After how many numbers gradients repeat: a prime, so that no cut of a buffer falls on a period's end."""
FACTORS = (1.0, 0.5, 2.0, 0.25)
"""The factors that the gradients are multiplied by, step by step."""


class HandOver(torch.autograd.Function):
    """A loss whose gradients are known: backward only hands them over."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        # Each an object of its own, which autograd takes instead of copying it.
        return None, *(gradient.detach() for gradient in ctx.gradients)


class Parameters(torch.nn.Module):
    """Tensors of a model's shapes, the same numbers on every rank."""

    def __init__(self, shapes: list[torch.Size]):
        super().__init__()
        self.tensors = torch.nn.ParameterList(torch.full(shape, 0.5) for shape in shapes)
        # Asked for its members a ParameterList looks each up by name: for gpt2-tiny 0.1 to 0.2 ms of each step.
        self._handed = tuple(self.tensors)

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = HandOver.apply(gradients, *self._handed)
        return loss


def residues(rank: int) -> torch.Tensor:
    """The numbers that ``rank``'s gradients repeat, before a tensor's factor: multiples of 1/16, exact in 16 bits."""
    return ((torch.arange(PERIOD) * 7 + rank * 13) % PERIOD - PERIOD // 2).double() / 16


def tensor_factor(index: int) -> int:
    """What the residues are multiplied by in the gradient of tensor ``index``."""
    return 1 + index % 5


class KnownGradients:
    """The gradients of one rank, and the mean of all ranks' gradients. In the n-th step of a contestant they are
    multiplied by FACTORS[n % 4]."""

    def __init__(self, shapes: list[torch.Size], ranks: Ranks):
        self.shapes = shapes
        self.factor = 1.0
        self.gradients: list[torch.Tensor] = []
        for index, shape in enumerate(shapes):
            pattern = (residues(ranks.rank) * tensor_factor(index)).float()
            repeated = pattern.repeat(shape.numel() // PERIOD + 1)[: shape.numel()]
            self.gradients.append(repeated.clone().view(shape))
        self.mean = torch.stack([residues(rank) for rank in range(ranks.size)]).mean(0)
        self.samples = [sorted({0, shape.numel() // 3, shape.numel() // 2, shape.numel() - 1}) for shape in shapes]
        counts = [
            torch.tensor([shape.numel() // PERIOD + (at < shape.numel() % PERIOD) for at in range(PERIOD)])
            for shape in shapes
        ]
        squares = [
            float((self.mean * tensor_factor(index)).square() @ count.double()) for index, count in enumerate(counts)
        ]
        self.norm = sum(squares) ** 0.5

    def fill(self, step: int) -> None:
        factor = FACTORS[step % len(FACTORS)]
        if factor != self.factor:
            torch._foreach_mul_(self.gradients, factor / self.factor)  # powers of two: exact
            self.factor = factor


class Reference:
    """AdamW in float64 on a few numbers of every tensor."""

    def __init__(self, known: KnownGradients):
        self.known = known
        self.numbers = [torch.nn.Parameter(torch.full((len(at),), 0.5, dtype=torch.float64)) for at in known.samples]
        self.optimizer = torch.optim.AdamW(self.numbers, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=True)
        self.steps = 0

    def advance(self) -> float:
        """One step; returns the gradient's norm."""
        factor = FACTORS[self.steps % len(FACTORS)]
        norm: float = self.known.norm * factor
        clip = min(1.0, MAX_GRAD_NORM / (norm + 1e-6))
        for index, (number, at) in enumerate(zip(self.numbers, self.known.samples, strict=True)):
            number.grad = self.known.mean[torch.tensor(at) % PERIOD] * (tensor_factor(index) * factor * clip)
        self.optimizer.step()
        self.steps += 1
        return norm

    def wrong(self, norm: float, parameters: list[torch.Tensor]) -> int:
        """How many samples of the parameters are wrong after the step that was just made; a wrong norm adds one."""
        expected_norm = self.advance()
        # torch's norm adds the squares of a tensor of 2 10^7 numbers in fp32, and is wrong by 3e-4 there; a rank left
        # out would be 1/P. An update (up to the learning rate) is right to 1e-3 of itself, and each step rounds a
        # number of size 0.5 by up to 3e-8.
        count = int(abs(norm - expected_norm) > 1e-3 * expected_norm)
        tolerance = 1e-3 * LEARNING_RATE + self.steps * 6e-8
        for number, at, tensor in zip(self.numbers, self.known.samples, parameters, strict=True):
            count += int(((tensor.detach().view(-1)[at].double() - number.detach()).abs() > tolerance).sum())
        return count
