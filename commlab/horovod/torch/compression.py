"""Compression of what travels: 16-bit numbers, which are added in fp32, divided, and rounded once."""

from __future__ import annotations

from typing import Any

import torch


class Compressor:
    """What :func:`compress` has made smaller, :func:`decompress` makes whole. Programs may write their own."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The tensor that travels, and what :func:`decompress` has to know."""
        raise NotImplementedError

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """The tensor as it was before, with the numbers that have come back."""
        raise NotImplementedError


class NoneCompressor(Compressor):
    """Numbers travel as they are."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return tensor, None

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return tensor


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Any]:
    narrows = tensor.is_floating_point() and tensor.element_size() > dtype.itemsize
    return (tensor.to(dtype) if narrows else tensor), tensor.dtype


class FP16Compressor(Compressor):
    """Floating-point numbers travel as float16."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return _narrowed(tensor, torch.float16)

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return tensor if ctx is None else tensor.to(ctx)


class BF16Compressor(FP16Compressor):
    """Floating-point numbers travel as bfloat16, which has the range of float32."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return _narrowed(tensor, torch.bfloat16)


class Compression:
    """What an optimizer's ``compression`` may be."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
