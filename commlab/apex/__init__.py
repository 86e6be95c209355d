"""NVIDIA Apex itself, for precision ``apex``: parameters in 16 bits, fp32 masters of them, and what Apex has for both.

    gradient, 16 bits, scaled   multi_tensor_scale   gradient, fp32
    master, fp32                FusedAdam            master, fp32
    master, fp32                multi_tensor_scale   parameter, 16 bits

That is the scheme of apex.amp's O2, by hand: apex.amp is gone from Apex (release 25.04 is the last with it), and an
owner must update pieces of parameters. Where apex.amp is still there, its O1 or O2 can be asked for, and prepares the
model. The masters are :class:`commlab.precision.masters.Fp32Masters`. P. Micikevicius et al., "Mixed precision
training", ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from ..errors import UsageError


class Apex:
    """What commlab uses of NVIDIA Apex. The constructor raises UsageError, with all that is missing."""

    def __init__(self) -> None:
        reasons = [] if _sees_gpu() else [f"torch {torch.__version__} sees no GPU"]
        optimizers = _module("apex.optimizers")
        appliers = _module("apex.multi_tensor_apply")
        kernels = _module("amp_C")
        self.amp = _module("apex.amp")
        if _module("apex") is None:
            reasons.append("no module `apex`")
        elif not hasattr(optimizers, "FusedAdam") or not hasattr(appliers, "multi_tensor_applier"):
            reasons.append("the module `apex` is not NVIDIA's, which has apex.optimizers.FusedAdam")
        elif kernels is None:
            reasons.append("Apex was built without its CUDA extensions, module `amp_C`")
        if reasons:
            raise UsageError(
                f"precision apex is not to be had: {'; '.join(reasons)}. It needs a GPU and NVIDIA Apex, built from "
                "github.com/NVIDIA/apex with its C++ and CUDA extensions (PyPI's `apex` is another package). Precision "
                "fp16 does the same with commlab's own kernels, and needs neither"
            )
        self.FusedAdam: type[torch.optim.Optimizer] = optimizers.FusedAdam
        self._apply, self._scale = appliers.multi_tensor_applier, kernels.multi_tensor_scale

    def scale(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], factor: float) -> None:
        """targets = factor x sources, cast. One launch for some hundred tensors. What the kernel writes to its overflow
        buffer is not read, so that nothing waits for the GPU: ranks have agreed before on what overflowed."""
        filled = [pair for pair in zip(sources, targets, strict=True) if pair[0].numel()]
        if not filled:
            return
        # Apex takes contiguous tensors only.
        read = [source.contiguous() for source, _ in filled]
        written = [target if target.is_contiguous() else target.contiguous() for _, target in filled]
        overflow_buffer = torch.zeros(1, dtype=torch.int32, device=read[0].device)
        self._apply(self._scale, overflow_buffer, [read, written], factor)
        for result, (_, target) in zip(written, filled, strict=True):
            if result is not target:
                target.copy_(result)

    def prepare(self, model: torch.nn.Module, level: str | None) -> bool:
        """Make the model compute in fp16; returns whether its parameters are in fp16 now. ``level``: O1 or O2 of
        apex.amp, or None to do without apex.amp."""
        if level is None:
            for parameter in model.parameters():
                if parameter.dtype == torch.float32:
                    parameter.data = parameter.data.half()
            return True
        if self.amp is None or not hasattr(self.amp, "initialize"):
            raise UsageError(
                f"apex.amp's {level} is not to be had: this Apex has no amp, which was removed after release 25.04; "
                "leave the level out, and commlab does what O2 does"
            )
        # May be called once in a process, and changes the model in place. The loss scale is commlab's: all ranks share
        # it.
        self.amp.initialize(model, opt_level=level, loss_scale=1.0, verbosity=0)
        return level == "O2"


def fused_adam(groups: Any, **options: Any) -> torch.optim.Optimizer:
    """Apex's FusedAdam, as AdamW, for :func:`commlab.strategy` with precision ``apex``. UsageError where there is
    none."""
    return Apex().FusedAdam(groups, adam_w_mode=True, **options)  # type: ignore[call-arg]


def _sees_gpu() -> bool:
    return torch.cuda.is_available()


def _module(name: str) -> Any:
    """The module ``name``, or None; an installed one that cannot be loaded counts as missing."""
    try:
        return import_module(name)
    except (ImportError, OSError, AttributeError, SyntaxError, RuntimeError):
        return None
