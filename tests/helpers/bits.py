"""For tests of the native arithmetic against torch's: numbers that hurt, and whether two tensors have the same bits."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from commlab import native

BUILT = [name for name in native.backends() if name != "torch"]
"""The native backends of this build and this machine."""

needs_native = pytest.mark.skipif(not BUILT, reason=f"no native module: {native.backend()}")
"""Without a compiler commlab runs on torch alone, and then there is nothing to compare."""

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers that show a number's bits, by its size in bytes."""

SPECIALS = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 65504.0, 65520.0, 1e-7, -6e-8, 1e-40]
"""Signed zeros and ones, what is no number, the largest fp16 and the first that rounds to its infinity, subnormals."""


@functools.cache
def numbers(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers distinct per seed and index; every 7th or 11th float is special, integers reach the dtype's limits.

    The tensor is cached, and must not be written to.
    """
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max, (numel,), dtype=dtype, generator=generator)
    values = torch.randn(numel, dtype=torch.float64, generator=generator) * 10.0 ** (seed % 5)
    # Steps 7 and 11 are coprime with each other and with the 12 specials: two seeds meet in every pair of them.
    special = torch.arange(0, numel, 7 if seed % 2 else 11)
    values[special] = torch.tensor(SPECIALS, dtype=torch.float64)[torch.arange(len(special)) % len(SPECIALS)]
    return values.to(dtype)


def assert_same_bits(got: Tensor, want: Tensor, zeros_equal: bool = False) -> None:
    """Every number has the bits of its counterpart.

    Any NaN equals any NaN, and with ``zeros_equal`` both zeros are equal too.
    """
    bits = BITS[got.element_size()]
    different = got.view(bits) != want.view(bits)
    if got.is_floating_point():
        different &= ~(got.isnan() & want.isnan())
    if zeros_equal:
        different &= ~((got == 0) & (want == 0))
    where = different.nonzero().flatten()[:5].tolist()
    assert not where, f"{int(different.sum())} of {len(got)} differ, at {where}: {got[where]} is not {want[where]}"
