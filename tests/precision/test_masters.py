"""What the optimizer is given: gradients multiplied once, in enough precision, for the pieces that a rank owns."""

from __future__ import annotations

import pytest
import torch

from commlab.checkpoint.pieces import Piece
from commlab.gradients.parameters import named_parameters
from commlab.precision.masters import InPlaceMasters

FACTOR = 0.3


def numbers(seed: int, numel: int = 24) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def masters_of(dtype: torch.dtype, **options: bool) -> tuple[torch.nn.ParameterList, InPlaceMasters]:
    model = torch.nn.ParameterList([numbers(1).to(dtype).view(4, 6), numbers(2).to(dtype)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    return model, InPlaceMasters(optimizer, named_parameters(model, optimizer))


def own_halves(masters: InPlaceMasters, model: torch.nn.ParameterList) -> None:
    """All of the first parameter, in two pieces, and the end of the second."""
    first, second = named_parameters(model, torch.optim.SGD(model.parameters()))
    flat, other = first.tensor.detach().view(-1), second.tensor.detach()
    masters.own([Piece(first, 0, 10, flat[:10]), Piece(first, 10, 24, flat[10:]), Piece(second, 20, 24, other[20:])])


@pytest.mark.parametrize("fused", [False, True])
def test_pieces_are_updated_as_the_whole_is(fused: bool) -> None:
    """Whether the gradient is multiplied before the optimizer, or divided by a fused one as it goes."""
    whole, cut = (masters_of(torch.float32, fused=fused) for _ in range(2))
    whole[1].own_all()
    own_halves(cut[1], cut[0])
    for step in range(3):
        gradients = [numbers(10 + step), numbers(20 + step)]
        for parameter, gradient in zip(whole[0], gradients, strict=True):
            parameter.grad = gradient.clone().view(parameter.shape)
        whole[1].step(FACTOR)
        cut[1].step_pieces([gradients[0][:10].clone(), gradients[0][10:].clone(), gradients[1][20:].clone()], FACTOR)
    assert torch.allclose(cut[0][0], whole[0][0], rtol=1e-6, atol=1e-7)
    assert torch.allclose(cut[0][1][20:], whole[0][1][20:], rtol=1e-6, atol=1e-7)
    assert torch.equal(cut[0][1][:20], numbers(2)[:20]), "a piece that another rank owns"
    assert all(piece.tensor.grad is None for piece in cut[1].pieces)


def test_a_piece_without_a_gradient_is_passed_over() -> None:
    model, masters = masters_of(torch.float32)
    own_halves(masters, model)
    masters.step_pieces([None, numbers(3, 14), None], FACTOR)
    assert torch.equal(model[0].view(-1)[:10], numbers(1)[:10]) and torch.equal(model[1], numbers(2))
    assert not torch.equal(model[0].view(-1)[10:], numbers(1)[10:])


@pytest.mark.parametrize("sums", [torch.float16, torch.bfloat16])
def test_sums_of_16_bits_are_not_rounded_again(sums: torch.dtype) -> None:
    """They reach an fp32 parameter multiplied in fp32."""
    model = torch.nn.ParameterList([torch.zeros(24)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    (parameter,) = named_parameters(model, optimizer)
    masters = InPlaceMasters(optimizer, [parameter])
    masters.own([Piece(parameter, 0, 24, parameter.tensor.detach())])
    gradient = numbers(4).to(sums)
    masters.step_pieces([gradient.clone()], FACTOR)
    assert torch.equal(model[0], -(gradient.float() * FACTOR))
