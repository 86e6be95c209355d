"""Fused pack: all tensors of a bucket to one contiguous wire part, and back, in one pass and one call."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from commlab.native import library
from commlab.native.arithmetic import range_error
from commlab.native.dtypes import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_WIRES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class PackPlan:
    """Where the tensors of a bucket lie and where their numbers go on the wire; made once per bucket.

    Tensor i takes the wire's numbers starts[i] .. starts[i] + numel, by default one tensor behind the other.
    Tensors: CPU, fp32, fp64, fp16 or bf16, mixed as you like, of any strides (others than contiguous ones cost one
    more copy). Wire: fp32, fp16, bf16; or fp64 if all tensors are fp64.

    The scale is applied in fp32 (fp64 numbers are rounded to fp32 first, but on an fp64 wire nothing is),
    then cast, rounding to nearest even: the same bits as `tensor.float() * scale` cast by torch, NaN payloads excepted.
    """

    def __init__(self, tensors: Sequence[Tensor], wire: torch.dtype, starts: Sequence[int] | None = None) -> None:
        self.wire = wire
        self._signature = signature_of(tensors)
        for index, (dtype, _) in enumerate(self._signature):
            if wire not in _WIRES or dtype not in _WIRES or (wire is torch.float64 and dtype is not wire):
                raise TypeError(f"PackPlan: tensor {index} is {dtype} and cannot travel on a wire of {wire}")
        numels = [tensor.numel() for tensor in tensors]
        self.starts = list(starts) if starts is not None else list(accumulate(numels, initial=0))[:-1]
        self.end = end_of_places(self.starts, numels)
        self._native: Any = None
        if library.built is not None:
            codes = [DTYPES[dtype][0] for dtype, _ in self._signature]
            self._native = library.built.PackPlan(numels, self.starts, codes, DTYPES[wire][0])
        self.rebind(tensors)

    def rebind(self, tensors: Sequence[Tensor]) -> None:
        """Use these tensors from now on: same dtypes and shapes, other memory (gradients made anew, for example)."""
        signature = signature_of(tensors)
        if signature != self._signature:
            raise ValueError(
                f"PackPlan: made for tensors {self._signature}, which are now {signature}; make a new plan"
            )
        for index, tensor in enumerate(tensors):
            if not tensor.is_cpu:
                raise ValueError(f"PackPlan: tensor {index} is on {tensor.device}; this plan packs CPU memory")
        self._tensors = list(tensors)
        self._addresses = list(map(torch.Tensor.data_ptr, tensors))
        self._staged = [
            (tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
            for tensor in tensors
            if not tensor.is_contiguous()
        ]
        if self._native is not None:
            addresses = self._addresses
            if self._staged:
                staged = iter(self._staged)
                addresses = [
                    tensor.data_ptr() if tensor.is_contiguous() else next(staged)[1].data_ptr() for tensor in tensors
                ]
            self._native.set_addresses(addresses)

    def release(self) -> None:
        """Let go of the tensors, whose memory would live as long as the plan; it wants a "
        "`rebind` before the next use."""
        self._tensors, self._staged = [], []
        self._addresses = [0]  # nobody's: use without a rebind is noticed

    def pack(self, wire: Tensor, wire_start: int = 0, scale: float = 1.0) -> bool:
        """Write scale x tensors to wire[wire_start:]; return whether every number written is finite.

        False for inf or NaN in a tensor and for a number that overflowed on the wire.
        """
        address = self._address_on(wire, wire_start)
        with torch.no_grad():
            if library.active is None:
                return self._torch_pack(wire.view(-1)[wire_start:], scale)
            for tensor, stage in self._staged:
                stage.copy_(tensor)
            return bool(self._native.pack(address, scale))

    def unpack(self, wire: Tensor, wire_start: int = 0, scale: float = 1.0) -> None:
        """Write scale x wire[wire_start:] to the tensors, cast to their dtypes."""
        address = self._address_on(wire, wire_start)
        with torch.no_grad():
            if library.active is None:
                self._torch_unpack(wire.view(-1)[wire_start:], scale)
                return
            self._native.unpack(address, scale)
            for tensor, stage in self._staged:
                tensor.copy_(stage)

    def _address_on(self, wire: Tensor, wire_start: int) -> int:
        if wire.dtype is not self.wire:
            raise TypeError(f"PackPlan: made for a wire of {self.wire}, given one of {wire.dtype}")
        # `p.data = ...` moves a tensor without telling anybody: to look costs 0.1 us a tensor.
        if list(map(torch.Tensor.data_ptr, self._tensors)) != self._addresses:
            self.rebind(self._tensors)
        if not (0 <= wire_start <= wire.numel() - self.end and wire.is_cpu and wire.is_contiguous()):
            raise range_error("PackPlan wire", wire, wire_start, self.end)
        return wire.data_ptr() + wire_start * DTYPES[self.wire][1]

    def _torch_pack(self, wire: Tensor, scale: float) -> bool:
        finite = True
        for tensor, start in zip(self._tensors, self.starts, strict=True):
            part = wire[start : start + tensor.numel()]
            part.copy_(_computed(tensor.reshape(-1), self.wire) * scale)
            finite = finite and bool(part.isfinite().all())
        return finite

    def _torch_unpack(self, wire: Tensor, scale: float) -> None:
        for tensor, start in zip(self._tensors, self.starts, strict=True):
            part = wire[start : start + tensor.numel()]
            tensor.copy_((_computed(part, self.wire) * scale).view(tensor.shape))


def _computed(numbers: Tensor, wire: torch.dtype) -> Tensor:
    """The numbers as the scale meets them."""
    return numbers if wire is torch.float64 else numbers.float()


def signature_of(tensors: Sequence[Tensor]) -> list[tuple[torch.dtype, torch.Size]]:
    """What a plan is made for: it holds for other memory of the same dtypes and shapes."""
    return [(tensor.dtype, tensor.shape) for tensor in tensors]


def end_of_places(starts: Sequence[int], numels: Sequence[int]) -> int:
    """Where the last tensor ends on the wire, once it is certain that no two tensors share a place."""
    end = 0
    for start, numel in sorted(zip(starts, numels, strict=True)):
        if start < end and numel > 0:
            raise ValueError(f"PackPlan: starts {starts} let tensors of {numels} numbers overlap, or begin below 0")
        end = max(end, start + numel)
    return end
