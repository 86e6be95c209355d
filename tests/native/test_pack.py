"""The fused pack against plain torch, bit for bit (any NaN equals any NaN), on every instruction set there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from packed import EDGES, SHAPES, same_bits
from torch import Tensor

from commlab import native
from commlab.native import PackPlan

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
PAIRS = [pair for pair in itertools.product(FLOATS, FLOATS) if pair[1] is not torch.float64 or pair[0] is pair[1]]
INF, NAN = float("inf"), float("nan")


def tensors_of(dtype: torch.dtype, edges: bool) -> list[Tensor]:
    """One tensor per shape, its numbers distinct per tensor and index; with edges, every fifth is one of EDGES."""
    generator = torch.Generator().manual_seed(7)
    tensors = []
    for shape in SHAPES:
        flat = torch.randn(torch.Size(shape).numel(), dtype=torch.float64, generator=generator)
        if edges:
            places = torch.arange(0, len(flat), 5)
            flat[places] = torch.tensor(EDGES, dtype=torch.float64)[torch.arange(len(places)) % len(EDGES)]
        tensors.append(flat.to(dtype).reshape(shape))
    return tensors


def by_hand(tensors: list[Tensor], wire: torch.dtype, scale: float) -> Tensor:
    """What the wire must carry, the slow way."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    return (flat if wire is torch.float64 else flat.float()).mul(scale).to(wire)


@pytest.mark.parametrize("backend", native.backends())
@pytest.mark.parametrize(("dtype", "wire"), PAIRS, ids=str)
def test_pack_and_unpack(backend: str, dtype: torch.dtype, wire: torch.dtype) -> None:
    for edges, scale in ((False, 1.0), (True, 1 / 3), (True, 1024.0)):
        tensors = tensors_of(dtype, edges)
        want = by_hand(tensors, wire, scale)
        part = torch.full((len(want) + 5,), 42.0, dtype=wire)
        with native.using(backend):
            finite = PackPlan(tensors, wire).pack(part, 3, scale)
        assert same_bits(part[3 : 3 + len(want)], want)
        assert part[:3].tolist() == [42.0] * 3 and part[3 + len(want) :].tolist() == [42.0] * 2, (
            "wrote outside its part"
        )
        assert finite == bool(want.isfinite().all())

        back = [torch.full_like(tensor, 42.0) for tensor in tensors]
        with native.using(backend):
            PackPlan(back, wire).unpack(part, 3, 1 / scale)
        received = (want if wire is torch.float64 else want.float()).mul(1 / scale).to(dtype)
        assert same_bits(torch.cat([tensor.reshape(-1) for tensor in back]), received)


@pytest.mark.parametrize("backend", native.backends())
@pytest.mark.parametrize("wire", [torch.float16, torch.bfloat16], ids=str)
def test_every_16bit_pattern_travels(backend: str, wire: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(wire)
    for dtype in (torch.float32, torch.float64, wire):
        part, back = torch.empty_like(every), torch.empty(2**16, dtype=dtype)
        with native.using(backend):
            assert not PackPlan([every.to(dtype)], wire).pack(part)
            PackPlan([back], wire).unpack(part)
        assert same_bits(part, every)
        assert same_bits(back, every.to(dtype))


@pytest.mark.parametrize("backend", native.backends())
@pytest.mark.parametrize("wire", FLOATS, ids=str)
@pytest.mark.parametrize("numel", [1, 5, 9, 40, 4_200_001])
def test_one_bad_number_is_seen_wherever_it_lies(backend: str, wire: torch.dtype, numel: int) -> None:
    tensor = torch.ones(numel, dtype=wire)
    part = torch.empty(numel, dtype=wire)
    with native.using(backend):
        plan = PackPlan([tensor], wire)
        assert plan.pack(part)
        for place in {0, numel // 2, numel - 1}:
            for bad in (INF, -INF, NAN):
                tensor[place] = bad
                assert not plan.pack(part), f"{bad} at {place} of {numel} went unseen"
            tensor[place] = 1.0
        assert plan.pack(part)


@pytest.mark.parametrize("backend", native.backends())
def test_what_overflows_is_seen(backend: str) -> None:
    """Finite in the tensor, not on the wire: by the cast, or by the scale."""
    part16, part32 = torch.empty(3, dtype=torch.float16), torch.empty(3)
    with native.using(backend):
        for number, scale, finite in [(65519.0, 1.0, True), (65520.0, 1.0, False), (1.0, 65536.0, False)]:
            assert PackPlan([torch.full((3,), number)], torch.float16).pack(part16, 0, scale) is finite
        assert PackPlan([torch.full((3,), 3e38)], torch.float32).pack(part32, 0, 0.5)
        assert not PackPlan([torch.full((3,), 3e38)], torch.float32).pack(part32, 0, 2.0)
        assert not PackPlan([torch.full((3,), 1e39, dtype=torch.float64)], torch.float32).pack(part32, 0, 1e-3)


@pytest.mark.parametrize("backend", native.backends())
def test_mixed_dtypes_strides_and_odd_places(backend: str) -> None:
    """One plan over everything awkward at once; the wire's gaps stay as they were."""
    bytes_ = torch.zeros(4 * 33 + 1, dtype=torch.uint8)
    tensors = [
        torch.randn(6, 5).T,
        torch.randn(20, dtype=torch.float64)[::3],
        torch.randn(4, 4, 4).half().permute(2, 0, 1),
        torch.randn(9).bfloat16()[1:8],
        torch.randn(()).expand(1),
        torch.frombuffer(memoryview(bytes_.numpy())[1:], dtype=torch.float32),  # at an odd address
    ]
    tensors[-1].copy_(torch.randn(33))
    assert tensors[-1].data_ptr() % 4 == 1
    starts = [200, 0, 40, 150, 180, 7]
    for wire in (torch.float32, torch.float16, torch.bfloat16):
        part = torch.full((300,), 42.0, dtype=wire)
        expected = part.clone()
        for tensor, start in zip(tensors, starts, strict=True):
            expected[start : start + tensor.numel()] = by_hand([tensor], wire, 0.5)
        with native.using(backend):
            assert PackPlan(tensors, wire, starts).pack(part, 0, 0.5)
        assert same_bits(part, expected)

        back = [torch.zeros_like(tensor) for tensor in tensors]
        back[0] = torch.zeros(6, 5).T
        with native.using(backend):
            PackPlan(back, wire, starts).unpack(part, 0, 2.0)
        for tensor, start in zip(back, starts, strict=True):
            want = (expected[start : start + tensor.numel()].float() * 2.0).to(tensor.dtype)
            assert same_bits(tensor, want.view(tensor.shape))


@pytest.mark.parametrize("backend", native.backends())
@pytest.mark.parametrize("shift_bytes", [1, 2, 4, 64])
def test_large_tensors_at_any_address(backend: str, shift_bytes: int) -> None:
    """Stores past the caches must be aligned: here dst begins before, at and between the places for them."""
    numel = 2_000_003
    memory = torch.zeros(4 * numel + shift_bytes, dtype=torch.uint8).numpy()
    there = torch.frombuffer(memoryview(memory)[shift_bytes:], dtype=torch.float32)
    there.copy_(torch.arange(numel).remainder_(2048))
    part = torch.zeros(numel + 3, dtype=torch.float16)
    with native.using(backend):
        plan = PackPlan([there], torch.float16)
        assert plan.pack(part, 3)
        assert torch.equal(part[3:].float(), torch.arange(numel).remainder_(2048).float())
        plan.unpack(part, 3, 2.0)
    assert torch.equal(there, torch.arange(numel).remainder_(2048).float() * 2)
    assert not memory[:shift_bytes].any()


@pytest.mark.parametrize("backend", native.backends())
def test_a_tensor_that_moved_is_followed(backend: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(100))
    part = torch.empty(100)
    with native.using(backend):
        plan = PackPlan([parameter], torch.float32)
        plan.pack(part)
        parameter.data = torch.arange(100.0)
        plan.pack(part)
        assert part.tolist() == list(range(100))
        plan.unpack(part, 0, 2.0)
        assert parameter.tolist() == list(range(0, 200, 2))

        plan.rebind([torch.full((100,), 5.0)])
        plan.pack(part)
        assert part.tolist() == [5.0] * 100

        parameter.data = torch.ones(50)
        plan.rebind([torch.full((100,), 5.0)])
        with pytest.raises(ValueError, match=r"made for tensors .*100.* now .*50.*make a new plan"):
            plan.rebind([parameter])


def test_misuse_is_refused_before_memory_is_touched() -> None:
    fp32, fp64 = torch.ones(8), torch.ones(8, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"tensor 1 is torch.float32 and cannot travel on a wire of torch.float64"):
        PackPlan([fp64, fp32], torch.float64)
    with pytest.raises(TypeError, match=r"tensor 0 is torch.int32"):
        PackPlan([fp32.int()], torch.float32)
    with pytest.raises(TypeError, match=r"wire of torch.int8"):
        PackPlan([fp32], torch.int8)
    for starts in ([0, 7], [-1, 8]):
        with pytest.raises(ValueError, match="overlap"):
            PackPlan([fp32, fp32], torch.float32, starts)
    plan = PackPlan([fp32, fp64], torch.float32)
    for backend in native.backends():
        with native.using(backend):
            with pytest.raises(TypeError, match=r"wire of torch.float32, given one of torch.float16"):
                plan.pack(torch.empty(16, dtype=torch.float16))
            with pytest.raises(ValueError, match=r"\[1:17\] reaches outside its tensor of 16 numbers"):
                plan.pack(torch.empty(16), 1)
            with pytest.raises(ValueError, match="contiguous"):
                plan.pack(torch.empty(32)[::2])
