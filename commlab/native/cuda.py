"""Fused pack on a GPU: what :class:`commlab.native.PackPlan` does, for tensors of one device, in one launch."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from commlab.native import library
from commlab.native.dtypes import DTYPES
from commlab.native.pack import end_of_places, signature_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cuda_backend() -> str:
    """What packs on GPUs: the kernels and what they were compiled for, or torch and why."""
    if library.built is None:
        return "torch: there is no native module"
    if hasattr(library.built, "CUDA"):
        return f"native: {library.built.CUDA}"
    return f"torch: {getattr(library.built, 'CUDA_MISSING', 'this build is older than the CUDA kernels')}"


class CudaPackPlan:
    """Where the tensors of a bucket lie in a GPU's memory and where their numbers go on the wire; made once per bucket.

    Tensor i takes the wire's numbers starts[i] .. starts[i] + numel, by default one tensor behind the other. Tensors
    and wire: contiguous, fp32, fp16 or bf16, on one device; as many tensors as you like. Bit for bit what PackPlan
    makes of the same numbers on the CPU (NaN payloads excepted).

    A pack or unpack is one kernel on torch's current stream. It waits for nothing and allocates nothing, so it may be
    captured into a CUDA graph; the tensors must be bound before. Where the native module has no CUDA kernels torch
    does the same, tensor by tensor.
    """

    def __init__(self, tensors: Sequence[Tensor], wire: torch.dtype, starts: Sequence[int] | None = None) -> None:
        self.wire = wire
        self._signature = signature_of(tensors)
        for index, (dtype, _) in enumerate(self._signature):
            if wire not in _DTYPES or dtype not in _DTYPES:
                raise TypeError(f"CudaPackPlan: tensor {index} is {dtype} and cannot travel on a wire of {wire}")
        numels = [tensor.numel() for tensor in tensors]
        self.starts = list(starts) if starts is not None else list(accumulate(numels, initial=0))[:-1]
        self.end = end_of_places(self.starts, numels)
        self.device = tensors[0].device if tensors else torch.device("cuda", torch.cuda.current_device())
        self._addresses: list[int] = []
        self._tensors: list[Tensor] = []
        self._native = library.built if hasattr(library.built, "CUDA") else None
        if self._native is not None:
            codes = [DTYPES[dtype][0] for dtype, _ in self._signature]
            self._layout = torch.tensor([numels, self.starts, codes], dtype=torch.int64, device="cpu").t().contiguous()
            self._layout = self._layout.to(self.device)
            self._chunks = chunk_table(numels, self._native.CUDA_CHUNK_NUMEL).to(self.device)
            self._on_device = torch.zeros(len(tensors), dtype=torch.int64, device=self.device)
            self._native.cuda_load(self.device.index)
        self.rebind(tensors)

    @staticmethod
    def takes(tensors: Sequence[Tensor], wire: torch.dtype) -> bool:
        """Whether the dtypes and the place of these are such that a plan can be made for them."""
        devices = {tensor.device for tensor in tensors}
        dtypes = {wire, *(tensor.dtype for tensor in tensors)}
        return len(devices) == 1 and next(iter(devices)).type == "cuda" and dtypes <= set(_DTYPES)

    def rebind(self, tensors: Sequence[Tensor]) -> None:
        """Use these tensors from now on: same dtypes and shapes, other memory. Costs one small copy to the device, on
        the current stream, where an address has changed."""
        signature = signature_of(tensors)
        if signature != self._signature:
            raise ValueError(
                f"CudaPackPlan: made for tensors {self._signature}, which are now {signature}; make a new plan"
            )
        for index, tensor in enumerate(tensors):
            if tensor.device != self.device or not tensor.is_contiguous():
                raise ValueError(
                    f"CudaPackPlan: tensor {index} must be contiguous and on {self.device}, not with strides "
                    f"{tensor.stride()} on {tensor.device}"
                )
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses == self._addresses or self._native is None:
            self._tensors = list(tensors)
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "CudaPackPlan: tensors have moved while a CUDA graph is being captured; bind those that the graph is "
                "to use before, and keep them"
            )
        # Pinned, so that nobody waits for the copy; torch gives that memory to no one else before the copy is done.
        here = torch.tensor(addresses, dtype=torch.int64, device="cpu").pin_memory()
        self._on_device.copy_(here, non_blocking=True)
        self._tensors, self._addresses = list(tensors), addresses

    def release(self) -> None:
        """Let go of the tensors, whose memory would live as long as the plan; it wants a `rebind` before the next
        use."""
        self._tensors = []

    def pack(
        self, wire: Tensor, wire_start: int = 0, scale: float | Tensor = 1.0, not_finite: Tensor | None = None
    ) -> None:
        """Write scale x tensors to wire[wire_start:].

        ``scale``: a number, or one fp32 number on the device (a graph's replays read it anew). ``not_finite``: int32[1]
        on the device; set to 1 where a number written is inf or NaN and left alone otherwise, so that one flag serves a
        whole step; zero it before.
        """
        address = self._address_on(wire, wire_start)
        if not_finite is not None and (not_finite.dtype is not torch.int32 or not_finite.device != self.device):
            raise TypeError(f"CudaPackPlan: not_finite is int32 on {self.device}, not {not_finite.dtype}")
        if self._native is None:
            self._torch_pack(wire.view(-1)[wire_start:], scale, not_finite)
            return
        flag = 0 if not_finite is None else not_finite.data_ptr()
        self._native.cuda_pack(
            *self._table(), address, DTYPES[self.wire][0], *self._scale(scale), flag, self.device.index, self._stream()
        )

    def unpack(self, wire: Tensor, wire_start: int = 0, scale: float | Tensor = 1.0) -> None:
        """Write scale x wire[wire_start:] to the tensors, cast to their dtypes."""
        address = self._address_on(wire, wire_start)
        if self._native is None:
            self._torch_unpack(wire.view(-1)[wire_start:], scale)
            return
        self._native.cuda_unpack(
            *self._table(), address, DTYPES[self.wire][0], *self._scale(scale), self.device.index, self._stream()
        )

    def _table(self) -> tuple[int, int, int, int]:
        return self._on_device.data_ptr(), self._layout.data_ptr(), self._chunks.data_ptr(), len(self._chunks)

    def _scale(self, scale: float | Tensor) -> tuple[float, int]:
        if not isinstance(scale, torch.Tensor):
            return scale, 0
        if scale.dtype is not torch.float32 or scale.device != self.device or scale.numel() != 1:
            raise TypeError(f"CudaPackPlan: a scale is a number, or one of fp32 on {self.device}, not {scale!r}")
        return 1.0, scale.data_ptr()

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _address_on(self, wire: Tensor, wire_start: int) -> int:
        if wire.dtype is not self.wire:
            raise TypeError(f"CudaPackPlan: made for a wire of {self.wire}, given one of {wire.dtype}")
        if wire.device != self.device or not wire.is_contiguous():
            raise ValueError(f"CudaPackPlan: the wire must be contiguous and on {self.device}, not on {wire.device}")
        if not 0 <= wire_start <= wire_start + self.end <= wire.numel():
            raise ValueError(
                f"CudaPackPlan: [{wire_start}:{wire_start + self.end}] reaches outside its wire of {wire.numel()} "
                "numbers"
            )
        if len(self._tensors) < len(self._signature):
            raise ValueError("CudaPackPlan: its tensors were released; call rebind() first")
        # `p.data = ...` moves a tensor without telling anybody.
        if [tensor.data_ptr() for tensor in self._tensors] != self._addresses:
            self.rebind(self._tensors)
        return wire.data_ptr() + wire_start * wire.element_size()

    def _torch_pack(self, wire: Tensor, scale: float | Tensor, not_finite: Tensor | None) -> None:
        with torch.no_grad():
            for tensor, start in zip(self._tensors, self.starts, strict=True):
                part = wire[start : start + tensor.numel()]
                part.copy_(tensor.reshape(-1).float() * scale)
                if not_finite is not None:
                    not_finite.logical_or_(part.isfinite().all().logical_not())

    def _torch_unpack(self, wire: Tensor, scale: float | Tensor) -> None:
        with torch.no_grad():
            for tensor, start in zip(self._tensors, self.starts, strict=True):
                tensor.copy_((wire[start : start + tensor.numel()].float() * scale).view(tensor.shape))


def chunk_table(numels: Sequence[int], chunk_numel: int) -> Tensor:
    """int32 [chunks, 2]: for each block of threads, which tensor, and which chunk of it (kernels/cuda/pack.h)."""
    counts = torch.tensor([-(-numel // chunk_numel) for numel in numels], dtype=torch.int64, device="cpu")
    tensors = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
    chunks = torch.arange(len(tensors), device="cpu") - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensors, chunks], 1).to(torch.int32).contiguous()
