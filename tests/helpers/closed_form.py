"""Data that differs per rank and per index, and its reduction: exact in every dtype, in any order of adding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.int32, torch.int64)
OPS = ("sum", "mean", "min", "max", "prod")
NUMELS = (0, 1, 2, 5, 64, 1000)

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

LARGEST_16_BIT = 15
"""The largest absolute value of :func:`numbers` in fp16 and bf16: 17 of them add up to 255, and bf16 holds every
integer up to 256."""


def numbers(rank: int, numel: int, dtype: torch.dtype, op: str = "sum") -> Tensor:
    """What ``rank`` contributes. For up to 17 ranks and 100_003 numbers every partial result of ``op`` is exact.

    Products: powers of two (floats), or small integers whose product wraps. Integers fill all their bytes, and wrap.
    """
    index = torch.arange(numel, dtype=torch.int64)
    if op == "prod":
        if not dtype.is_floating_point:
            return (1 + (index + rank) % 3 + 4 * (index % 2)).to(dtype)
        # Exponents -1, 0, 1 in turn: the product of any neighbouring ranks stays between 2^-6 and 2^6.
        sign = 1 - 2 * ((index // 3 + rank) % 5 == 0).double()
        return (sign * 2.0 ** ((index + rank) % 3 - 1)).to(dtype)
    if dtype in HALVES:
        # 7 x rank mod 31 differs for all ranks below 31; the multiplier spreads the indices.
        return ((index * 40503 // 128 + 7 * rank) % 31 - LARGEST_16_BIT).to(dtype)
    distinct = index + 100_003 * rank
    if dtype == torch.float32:
        return distinct.to(dtype)
    # More bits than an fp32 has, but few enough for exact sums; integers may wrap.
    return (distinct * (1_000_003 if dtype == torch.float64 else 0x1E3779B97F4A7C15)).to(dtype)


def reference(parts: Sequence[Tensor], op: str) -> Tensor:
    """``parts`` reduced in float64 (integers: in int64, which wraps as they do), and rounded once to their dtype."""
    dtype = parts[0].dtype
    wide = torch.stack([part.to(torch.float64 if dtype.is_floating_point else torch.int64) for part in parts])
    if op in ("min", "max"):
        return (wide.amin(0) if op == "min" else wide.amax(0)).to(dtype)
    result = wide.prod(0) if op == "prod" else wide.sum(0)
    return (result / len(parts) if op == "mean" else result).to(dtype)


@lru_cache(maxsize=1000)
def expected(op: str, size: int, numel: int, dtype: torch.dtype) -> Tensor:
    """What ``op`` over the :func:`numbers` of ranks ``0 .. size - 1`` must give. Kept, so don't write into it."""
    return reference([numbers(rank, numel, dtype, op) for rank in range(size)], op)


def ops_for(dtype: torch.dtype) -> tuple[str, ...]:
    return OPS if dtype.is_floating_point else tuple(op for op in OPS if op != "mean")


def divided_first(op: str, dtype: torch.dtype, algorithm: str) -> bool:
    """Whether the result is rounded at every hop: the mean of 16-bit numbers, but for ``direct``."""
    return op == "mean" and dtype in HALVES and algorithm != "direct"


def hop_tolerance(size: int, dtype: torch.dtype, largest: float = LARGEST_16_BIT) -> float:
    """How far a 16-bit mean that is divided first and rounded at every hop may be from the reference.

    With u the unit roundoff and M the largest contribution: the contributions M/P are rounded once each (u M
    together), the P-1 additions give partial sums of at most M, each rounded (u M each), and the reference is rounded
    too (u M).
    The factor covers the second-order terms: (1 + u)^(P+1) < 1.08 for bf16 and P = 17.
    """
    return 1.1 * (size + 1) * UNIT_ROUNDOFF[dtype] * largest


def same_bits(one: Tensor, other: Tensor) -> bool:
    bits = BITS[one.element_size()]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(bits), other.view(bits))
