"""How a number travels. What is computed is one thing (the gradient's dtype), what is sent is another (the wire's)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..chunks import Range

WIRES: dict[str | None, torch.dtype | None] = {None: None, "fp16": torch.float16, "bf16": torch.bfloat16}


def pack(sources: Sequence[torch.Tensor | None], ranges: Sequence[Range], flat: torch.Tensor, scale: float = 1.0) -> None:
    """Write every source, multiplied by ``scale`` and then rounded to ``flat``'s dtype, to its range of ``flat``.

    ``sources``: any shape and stride; None writes zeros. The product is computed in the source's precision, 16-bit sources' in fp32.
    ``flat``: 1-D, contiguous. Cost: one pass over the sources and ``flat``.
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


def unpack(flat: torch.Tensor, ranges: Sequence[Range], targets: Sequence[torch.Tensor | None]) -> None:
    """Write each range of ``flat`` into its target, cast to the target's dtype; None is passed over."""
    for target, place in zip(targets, ranges, strict=True):
        if target is not None:
            target.copy_(flat[place.start : place.stop].view(target.shape))
