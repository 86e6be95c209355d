"""Tensors of every dtype that torch has, and the bytes of a model."""

from __future__ import annotations

from typing import Any

import torch

from commlab.runtime.raw import bytes_of


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    found = [*model.named_parameters(), *model.named_buffers()]
    return {name: bytes_of(tensor).numpy().tobytes() for name, tensor in found}


def assert_alike(found: list[Any]) -> None:
    assert all(each == found[0] for each in found)


DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name)),
]


def of_dtype(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """15 numbers of any bits (of bool: 0 and 1), as 3 x 5."""
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.arange(15 * width).add(seed).mul(37).remainder(251).to(torch.uint8)
    return (raw % 2 if dtype is torch.bool else raw).view(dtype).view(3, 5)


def quantized(seed: int) -> list[torch.Tensor]:
    numbers = torch.arange(15.0).add(seed).sin().view(3, 5)
    return [
        torch.quantize_per_tensor(numbers, 0.05, 3, torch.qint8),
        torch.quantize_per_channel(numbers, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2]), 0, torch.quint8),
    ]
