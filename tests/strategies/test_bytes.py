"""Tensors of every dtype as bytes: they come back as they were, and a fingerprint sees each bit of them."""

from __future__ import annotations

import pytest
import torch
from every_dtype import DTYPES, of_dtype, quantized

from commlab.runtime.raw import bytes_of, fingerprint, from_bytes, layout_of, meaning_of, write_bytes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_every_dtype_come_back(dtype: torch.dtype) -> None:
    """A6: buffers of every dtype; however they lie."""
    wanted, other = of_dtype(dtype, 0), of_dtype(dtype, 1)
    assert fingerprint(wanted) != fingerprint(other) and layout_of(wanted) == layout_of(other)
    write_bytes(other, bytes_of(wanted))
    assert torch.equal(bytes_of(other), bytes_of(wanted))
    again = from_bytes(bytes_of(wanted), meaning_of(wanted))
    assert again.dtype == dtype and torch.equal(bytes_of(again), bytes_of(wanted))
    turned = of_dtype(dtype, 2).t()
    write_bytes(turned, bytes_of(wanted.t().contiguous()))
    assert torch.equal(bytes_of(turned.t().contiguous()), bytes_of(wanted))
    expanded = of_dtype(dtype, 3)[:, :1].expand(3, 5)
    write_bytes(expanded, bytes_of(wanted[:, :1].expand(3, 5)))
    assert torch.equal(bytes_of(expanded), bytes_of(wanted[:, :1].expand(3, 5)))
    scalar = of_dtype(dtype, 4)[0, 0]
    write_bytes(scalar, bytes_of(wanted[1, 1]))
    assert torch.equal(bytes_of(scalar), bytes_of(wanted[1, 1]))


@pytest.mark.filterwarnings("ignore")
def test_bytes_of_quantized_tensors_come_back() -> None:
    """A6: quantized buffers."""
    for wanted, other in zip(quantized(0), quantized(9), strict=True):
        assert layout_of(wanted) == layout_of(other) and not torch.equal(wanted.int_repr(), other.int_repr())
        write_bytes(other, bytes_of(wanted))
        assert torch.equal(wanted.int_repr(), other.int_repr())
        again = from_bytes(bytes_of(wanted), meaning_of(wanted))
        assert torch.equal(again.dequantize(), wanted.dequantize()) and layout_of(again) == layout_of(wanted)
    assert layout_of(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)) != layout_of(
        torch.quantize_per_tensor(torch.ones(2), 0.2, 0, torch.qint8)
    )


def test_a_fingerprint_sees_one_bit_anywhere() -> None:
    """A4: sizes around those of words, rows and of what is small; numbers that change places."""
    for numel in (1, 7, 8, 9, 65535, 65536, 65537, 2**17 + 5):
        numbers = torch.arange(numel).mul(131).remainder(256).to(torch.uint8)
        mark = fingerprint(numbers)
        for at in {0, numel // 3, numel - 1}:
            numbers[at] ^= 16
            assert fingerprint(numbers) != mark
            numbers[at] ^= 16
        assert fingerprint(numbers) == mark == fingerprint(numbers.clone())
        if numel > 100:
            for far in (1, 8, 16384, numel // 2):
                swapped = numbers.clone()
                swapped[[0, min(far, numel - 1)]] = numbers[[min(far, numel - 1), 0]]
                assert torch.equal(swapped, numbers) or fingerprint(swapped) != mark
