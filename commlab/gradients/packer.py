"""Packing: gradients as the wire has them. Numbers are computed in one dtype, the gradient's, and sent in another, the
wire's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..chunks import Range
from ..native import CudaPackPlan, PackPlan


def pack(
    sources: Sequence[torch.Tensor | None], ranges: Sequence[Range], flat: torch.Tensor, scale: float = 1.0
) -> None:
    """Write every source, multiplied by ``scale`` and then rounded to ``flat``'s dtype, to its range of ``flat``.

    ``sources``: any shape and stride; None writes zeros. The product is computed in the source's precision, 16-bit
    sources' in fp32. ``flat``: 1-D, contiguous. Cost: one pass over the sources and ``flat``.
    """
    for source, extent in zip(sources, ranges, strict=True):
        target = flat[extent.start : extent.stop]
        if source is None:
            target.zero_()
        elif scale == 1.0:
            target.view(source.shape).copy_(source)
        elif source.dtype in (torch.float16, torch.bfloat16):
            target.view(source.shape).copy_(source.float() * scale)
        elif source.dtype == flat.dtype:
            torch.mul(source, scale, out=target.view(source.shape))
        else:
            target.view(source.shape).copy_(source * scale)


class Packer:
    """Packs a bucket's gradients, and unpacks them, in one native pass over all of them: read, scale, round, write,
    look for inf and NaN; on a GPU in one launch. :func:`pack` and :func:`unpack` do this in plain torch, and run where
    a gradient is missing or the tensors are not all in one memory. ``ranges``: each gradient's range in the flat
    buffer."""

    def __init__(self, ranges: Sequence[Range]):
        self._ranges = ranges
        self._plan: PackPlan | None = None
        self._cuda_plan: CudaPackPlan | None = None
        self._not_finite: torch.Tensor | None = None
        """int32[1], on the GPU that has packed: not 0 where a number was not finite. None before a GPU has packed."""

    def pack(self, sources: Sequence[torch.Tensor | None], flat: torch.Tensor, scale: float) -> bool:
        """Write ``scale`` x every source to its range of ``flat``, rounded once to its dtype; None writes zeros.
        Returns whether every number written is finite; on a GPU True, because the answer comes later
        (:meth:`finite`)."""
        present = [source for source in sources if source is not None and source.device == flat.device]
        whole = len(present) == len(sources)
        if flat.is_cuda:
            if self._not_finite is None:
                self._not_finite = torch.zeros(1, dtype=torch.int32, device=flat.device)
            if whole and CudaPackPlan.takes(present, flat.dtype):
                plan = self._cuda_planned([source.contiguous() for source in present], flat.dtype)
                plan.pack(flat, 0, scale, self._not_finite)
                plan.release()
            else:
                pack(sources, self._ranges, flat, scale)
                self._not_finite.logical_or_(flat.isfinite().all().logical_not())
            return True
        if not whole:
            pack(sources, self._ranges, flat, scale)
            return bool(flat.isfinite().all())
        planned = self._planned(present, flat.dtype)
        finite = planned.pack(flat, scale=scale)
        planned.release()
        return finite

    def finite(self) -> bool:
        """Whether all that was packed on a GPU since :meth:`forget` is finite. Waits for the GPU."""
        return self._not_finite is None or not self._not_finite.item()

    def forget(self) -> None:
        """Begin anew to look for numbers that are not finite."""
        if self._not_finite is not None:
            self._not_finite.zero_()

    def unpack(self, flat: torch.Tensor, targets: Sequence[torch.Tensor | None]) -> None:
        """Write each range of ``flat`` into its target, cast to the target's dtype; None is passed over."""
        present = [target for target in targets if target is not None and target.device == flat.device]
        if len(present) == len(targets) and flat.is_cpu:
            plan = self._planned(present, flat.dtype)
            plan.unpack(flat)
            plan.release()
            return
        contiguous = all(target.is_contiguous() for target in present)
        if len(present) == len(targets) and contiguous and CudaPackPlan.takes(present, flat.dtype):
            cuda_plan = self._cuda_planned(present, flat.dtype)
            cuda_plan.unpack(flat)
            cuda_plan.release()
        else:
            unpack(flat, self._ranges, targets)

    def _planned(self, tensors: Sequence[torch.Tensor], wire: torch.dtype) -> PackPlan:
        # Gradients are made anew in every step, in other memory, of the same shapes.
        if self._plan is None:
            self._plan = PackPlan(tensors, wire, [extent.start for extent in self._ranges])
        else:
            self._plan.rebind(tensors)
        return self._plan

    def _cuda_planned(self, tensors: Sequence[torch.Tensor], wire: torch.dtype) -> CudaPackPlan:
        if self._cuda_plan is None:
            self._cuda_plan = CudaPackPlan(tensors, wire, [extent.start for extent in self._ranges])
        else:
            self._cuda_plan.rebind(tensors)
        return self._cuda_plan


def unpack(flat: torch.Tensor, ranges: Sequence[Range], targets: Sequence[torch.Tensor | None]) -> None:
    """Write each range of ``flat`` into its target, cast to the target's dtype; None is passed over."""
    for target, extent in zip(targets, ranges, strict=True):
        if target is not None:
            target.copy_(flat[extent.start : extent.stop].view(target.shape))
