"""How a number travels. What is computed is one thing (the gradient's dtype), what is sent is another (the wire's)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..chunks import Range
from ..native import PackPlan

WIRES: dict[str | None, torch.dtype | None] = {None: None, "fp16": torch.float16, "bf16": torch.bfloat16}


def pack(
    sources: Sequence[torch.Tensor | None], ranges: Sequence[Range], flat: torch.Tensor, scale: float = 1.0
) -> None:
    """Write every source, multiplied by ``scale`` and then rounded to ``flat``'s dtype, to its range of ``flat``.

    ``sources``: any shape and stride; None writes zeros. The product is computed in the source's precision, 16-bit
    sources' in fp32. ``flat``: 1-D, contiguous. Cost: one pass over the sources and ``flat``.
    """
    for source, place in zip(sources, ranges, strict=True):
        target = flat[place.start : place.stop]
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
    look for inf and NaN. :func:`pack` and :func:`unpack` are the same in plain torch, and run where a gradient is
    missing or not in CPU memory."""

    def __init__(self, ranges: Sequence[Range]):
        self._ranges = ranges
        self._plan: PackPlan | None = None

    def pack(self, sources: Sequence[torch.Tensor | None], flat: torch.Tensor, scale: float) -> bool:
        """Write ``scale`` x every source to its range of ``flat``, rounded once to its dtype; None writes zeros.
        Returns whether every number written is finite."""
        present = [source for source in sources if source is not None and source.is_cpu]
        if len(present) < len(sources):
            pack(sources, self._ranges, flat, scale)
            return bool(flat.isfinite().all())
        plan = self._planned(present, flat.dtype)
        finite = plan.pack(flat, scale=scale)
        plan.release()
        return finite

    def unpack(self, flat: torch.Tensor, targets: Sequence[torch.Tensor | None]) -> None:
        """Write each range of ``flat`` into its target, cast to the target's dtype; None is passed over."""
        present = [target for target in targets if target is not None and target.is_cpu]
        if len(present) < len(targets):
            unpack(flat, self._ranges, targets)
        else:
            plan = self._planned(present, flat.dtype)
            plan.unpack(flat)
            plan.release()

    def _planned(self, tensors: Sequence[torch.Tensor], wire: torch.dtype) -> PackPlan:
        # Gradients are made anew in every step, in other memory, of the same shapes.
        if self._plan is None:
            self._plan = PackPlan(tensors, wire, [place.start for place in self._ranges])
        else:
            self._plan.rebind(tensors)
        return self._plan


def unpack(flat: torch.Tensor, ranges: Sequence[Range], targets: Sequence[torch.Tensor | None]) -> None:
    """Write each range of ``flat`` into its target, cast to the target's dtype; None is passed over."""
    for target, place in zip(targets, ranges, strict=True):
        if target is not None:
            target.copy_(flat[place.start : place.stop].view(target.shape))
