"""fp32 masters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..apex import Apex
from ..gradients.parameters import NamedParameter


class Masters:
    """fp32 masters of parameters that are in 16 bits; the parameters themselves where apex.amp left them in fp32."""

    def __init__(self, apex: Apex, model: torch.nn.Module, parameters: Sequence[NamedParameter], level: str | None):
        self.apex = apex
        kept = {item.index: item.tensor.detach().float().contiguous().clone() for item in parameters}
        self.separate = apex.prepare(model, level)
        self.whole = kept if self.separate else {item.index: item.tensor for item in parameters}

    def unscale(self, gradients: Sequence[torch.Tensor], masters: Sequence[torch.Tensor], factor: float) -> bool:
        """Give ``masters`` fp32 gradients, ``factor`` x ``gradients``; whether these are all finite."""
        for master in masters:
            master.grad = torch.empty_like(master)
        return self.apex.scale(gradients, [master.grad for master in masters if master.grad is not None], factor)
