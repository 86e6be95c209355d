"""The reduced gradient between backward and step, in the pieces that a rank can edit: for clipping by value, noise,
norms per layer, under every strategy."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import torch

from ..gradients.parameters import NamedParameter
from ..native.norm import norm_squared
from ..runtime.control import exchange_records
from ..runtime.group import Group
from .start import Training


@dataclass(eq=False)
class ReducedGradient:
    """A range of the reduced gradient of one parameter, which this rank can read and edit until ``engine.step()``."""

    name: str
    """The parameter's name."""
    start: int
    stop: int
    """The range: numbers ``start .. stop - 1`` of the parameter, flattened."""
    tensor: torch.Tensor
    """The gradient's values there, not multiplied by any loss scale; what is written into it is what the optimizer
    gets. Of the parameter's shape where the piece is the whole, else 1-D; where 16-bit numbers had to be unscaled, and
    on owners' shards, fp32."""
    replicated: bool
    """Whether other ranks have the same piece, and must edit it in the same way."""
    shape: torch.Size
    """The parameter's shape."""
    step: int
    """The engine's number of this step."""
    index: int = field(repr=False)
    """The parameter's index among those that are trained."""
    _held: torch.Tensor = field(repr=False)
    """What the strategy goes on with, multiplied by the loss scale."""
    _scale: float = field(repr=False)

    @classmethod
    def of(
        cls, item: NamedParameter, start: int, stop: int, held: torch.Tensor, scale: float, replicated: bool, step: int
    ) -> ReducedGradient:
        """The piece ``start .. stop - 1`` of the gradient of ``item``; the strategy has it in ``held``, multiplied by
        ``scale``."""
        numbers = held
        if scale != 1.0:
            numbers = held / scale if held.dtype in (torch.float32, torch.float64) else held.float() / scale
        if stop - start == item.tensor.numel() and numbers.shape != item.tensor.shape:
            numbers = numbers.view(item.tensor.shape)
        made = cls(item.name, start, stop, numbers, replicated, item.tensor.shape, step, item.index, held, scale)
        made._version = numbers._version
        return made

    def __post_init__(self) -> None:
        self._version = self.tensor._version

    @property
    def whole(self) -> bool:
        """Whether the piece is all of the parameter."""
        return self.stop - self.start == self.shape.numel()

    def draw(self, fill: Callable[[torch.Tensor, torch.Generator], object], seed: int = 0) -> torch.Tensor:
        """Random numbers for this piece: ``fill(whole, generator)`` fills a tensor of the whole parameter's shape
        (fp32, on the CPU), and this piece's range of it is returned, in the shape and dtype and on the device of
        :attr:`tensor`. The generator follows from ``seed``, the step and the parameter's name, so that the numbers are
        the same under every strategy and number of ranks. Cost: ``fill`` of the whole parameter."""
        text = f"{seed} {self.step} {self.name}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(blake2b(text, digest_size=7).digest(), "little"))
        whole = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        fill(whole, generator)
        return whole.view(-1)[self.start : self.stop].view(self.tensor.shape).to(self.tensor.device, self.tensor.dtype)

    def squares(self) -> float:
        """The sum of the squares of the piece."""
        return norm_squared([self.tensor])

    def put_back(self) -> None:
        """Give the strategy what was edited, where :attr:`tensor` is not what it goes on with."""
        if self._scale != 1.0 and self.tensor._version != self._version:
            self._held.copy_((self.tensor * self._scale).view(self._held.shape))


def whole_gradients(training: Training, scale: float) -> list[ReducedGradient]:
    """The gradients that the parameters have (``p.grad``), where every rank has all of them."""
    return [
        ReducedGradient.of(
            item, 0, item.tensor.numel(), item.tensor.grad, scale, training.group.size > 1, training.steps
        )
        for item in training.parameters
        if item.tensor.grad is not None
    ]


def norms(
    group: Group,
    parameters: Sequence[NamedParameter],
    pieces: Iterable[ReducedGradient],
    passed_over: set[int],
    *,
    sharded: bool,
) -> dict[str, float]:
    """The 2-norm of every parameter's reduced gradient, by name; without those ``passed_over`` (by index). Where ranks
    have different pieces (``sharded``) their squares are added in rank order. Collective then."""
    squares = [0.0] * len(parameters)
    present = set()
    for piece in pieces:
        squares[piece.index] += piece.squares()
        present.add(piece.index)
    if sharded:
        records = exchange_records(group, struct.pack(f"<{len(squares)}d", *squares), "squares of gradients")
        rows = [struct.unpack(f"<{len(squares)}d", record) for record in records]
        squares = [sum(column) for column in zip(*rows, strict=True)]
        present = {item.index for item in parameters} - passed_over
    return {item.name: squares[item.index] ** 0.5 for item in parameters if item.index in present}
