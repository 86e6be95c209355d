"""Packing against arithmetic in float64: every number scaled, rounded as documented, in its place."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commlab.chunks import Range
from commlab.gradients.packer import Packer, pack, unpack

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def ranges_of(sources: list[torch.Tensor]) -> list[Range]:
    stops = np.cumsum([source.numel() for source in sources]).tolist()
    return [Range(stop - source.numel(), stop) for source, stop in zip(sources, stops, strict=True)]


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """Contiguous, turned, strided, expanded, without dimension, empty."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 3).to(dtype)

    return [
        numbers(5, 7),
        numbers(3, 4).t(),
        numbers(9, 6)[::2, 1::3],
        numbers(1, 4).expand(3, 4),
        numbers(),
        numbers(0, 5),
        numbers(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ]


def expected(source: torch.Tensor, scale: float, wire: torch.dtype) -> torch.Tensor:
    """One rounding for the product, in the source's precision (fp32 for 16 bits), one for the cast."""
    if scale == 1.0:
        return source.to(wire)
    if source.dtype == torch.float64:
        return (source * scale).to(wire)
    # In float64 the product of two fp32 numbers is exact.
    return (source.double() * float(np.float32(scale))).float().to(wire)


@pytest.mark.parametrize("scale", [1.0, 0.25, 3 / 7, 1e-3])
@pytest.mark.parametrize("wire", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_number_is_scaled_rounded_and_in_place(dtype: torch.dtype, wire: torch.dtype, scale: float) -> None:
    sources = tensors(dtype)
    ranges = ranges_of(sources)
    flat = torch.full((ranges[-1].stop,), torch.nan, dtype=wire)
    pack(sources, ranges, flat, scale)
    wanted = torch.cat([expected(source, scale, wire).reshape(-1) for source in sources])
    assert torch.equal(flat, wanted)


@pytest.mark.parametrize("scale", [1.0, 3 / 7])
@pytest.mark.parametrize("wire", FLOATS[:1] + FLOATS[2:], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_packer_does_the_same_step_after_step(dtype: torch.dtype, wire: torch.dtype, scale: float) -> None:
    """Natively, with new tensors every time, some of them missing. fp64 is rounded to fp32 before it is scaled."""
    ranges = ranges_of(tensors(dtype))
    packer = Packer(ranges)
    for step in range(3):
        sources: list[torch.Tensor | None] = [tensor * (step + 1) for tensor in tensors(dtype)]
        if step == 1:
            sources[1] = None
        flat = torch.full((ranges[-1].stop,), torch.nan, dtype=wire)
        packer.pack(sources, flat, scale)
        for source, extent in zip(sources, ranges, strict=True):
            found = flat[extent.start : extent.stop]
            if source is None:
                assert not found.any()
            elif dtype != torch.float64 or step == 1:
                assert torch.equal(found, expected(source, scale, wire).reshape(-1))
            else:
                assert torch.equal(found, expected(source.float(), scale, wire).reshape(-1))
        targets: list[torch.Tensor | None] = [
            None if source is None else torch.zeros_like(source) for source in sources
        ]
        packer.unpack(flat, targets)
        for target, extent in zip(targets, ranges, strict=True):
            if target is not None:
                assert torch.equal(target.reshape(-1), flat[extent.start : extent.stop].to(dtype))


def test_a_missing_gradient_travels_as_zeros_and_neighbours_are_left_alone() -> None:
    flat = torch.arange(10.0)
    pack([None, torch.tensor([50.0])], [Range(2, 5), Range(7, 8)], flat, 2.0)
    assert flat.tolist() == [0, 1, 0, 0, 0, 5, 6, 100, 8, 9]


def test_64_bit_gradients_are_scaled_in_64_bits() -> None:
    flat = torch.empty(2, dtype=torch.float16)
    pack([torch.tensor([3e200, 1e-200], dtype=torch.float64)], [Range(0, 2)], flat, 1e-200)
    assert flat.tolist() == [3, 0], "3e200 is beyond fp32"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("wire", FLOATS, ids=str)
def test_unpack_writes_each_range_to_its_target(wire: torch.dtype, dtype: torch.dtype) -> None:
    targets: list[torch.Tensor | None] = [torch.zeros_like(tensor).contiguous() for tensor in tensors(dtype)]
    turned = torch.zeros(6, 5, dtype=dtype).t()
    targets += [None, turned]
    shapes = [torch.zeros(4) if target is None else target for target in targets]
    ranges = ranges_of(shapes)
    flat = torch.arange(ranges[-1].stop, dtype=torch.float64).div(64).to(wire)
    unpack(flat, ranges, targets)
    for target, extent in zip(targets, ranges, strict=True):
        if target is not None:
            assert torch.equal(target.reshape(-1), flat[extent.start : extent.stop].to(dtype))


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
    scale=st.floats(1e-3, 1e3),
    turned=st.booleans(),
)
def test_unpack_undoes_pack(shapes: list[list[int]], scale: float, turned: bool) -> None:
    generator = torch.Generator().manual_seed(len(shapes))
    sources = [torch.randn(shape, generator=generator) for shape in shapes]
    if turned:
        sources = [source.mT if source.dim() >= 2 else source for source in sources]
    ranges = ranges_of(sources)
    flat = torch.empty(sum(math.prod(shape) for shape in shapes))
    pack(sources, ranges, flat, scale)
    back = [torch.empty_like(source) for source in sources]
    unpack(flat, ranges, back)
    for source, result in zip(sources, back, strict=True):
        assert torch.equal(result, source * scale)
