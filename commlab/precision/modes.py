"""Modes: what the model is computed in. Each composes with every strategy; how numbers travel is the wire's business.

    fp32   everything in fp32
    bf16   16-bit matrix products where they are fast; bf16's range is fp32's, so there is no loss scale
    fp16   16-bit matrix products too, with a loss scale; a step that overflowed on any rank is skipped on all of them
    apex   NVIDIA Apex: parameters in fp16, FusedAdam on fp32 masters of them, the loss scale of fp16

But for apex, parameters are fp32 (the master weights of mixed precision); 16-bit copies exist inside autocast alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from ..apex import Apex
from ..errors import UsageError
from ..gradients.parameters import NamedParameter
from ..runtime.control import exchange_records
from ..runtime.group import Group
from .loss_scale import LossScale
from .masters import Fp32Masters, InPlaceMasters, Masters, master_of

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "apex": torch.float16}


class Precision:
    """One of ``PRECISIONS``, on the device of a model. Made by all ranks of ``group`` together: they must choose
    alike."""

    def __init__(
        self, name: str, autocast: str, device: torch.device, group: Group, loss_scale: LossScale | None = None
    ):
        self.name, self._device = name, device
        self.dtype = PRECISIONS[name]
        self.loss_scale = replace(loss_scale or LossScale()) if name in ("fp16", "apex") else None
        self.apex = Apex() if name == "apex" else None
        self.casts, self.reason = self._decide(autocast, group)

    def _decide(self, autocast: str, group: Group) -> tuple[bool, str]:
        if self.dtype is None:
            return False, "all in fp32"
        if self.apex is not None:
            return False, "parameters in fp16, Apex's FusedAdam on fp32 masters"
        if autocast != "auto":
            return autocast == "on", f"autocast {autocast}"
        # A processor without 16-bit matrix units does these products by conversion, up to 70 times slower than in fp32.
        ratio = _slowdown(self.dtype, self._device)
        answers = exchange_records(group, b"1" if ratio < 1.0 else b"0", "fast 16-bit products")
        fast = all(answer == b"1" for answer in answers)
        return (
            fast,
            f"16-bit products take {ratio:.2g} times as long as fp32 ones here: autocast {'on' if fast else 'off'}",
        )

    def masters(
        self,
        model: torch.nn.Module,
        parameters: Sequence[NamedParameter],
        optimizer: torch.optim.Optimizer,
        level: str | None,
    ) -> Masters:
        """What ``optimizer`` updates for ``parameters``. Under precision apex ``model`` computes in fp16 from here on
        (``level``: as apex.amp's level says, where one is given); UsageError for an optimizer that is not Apex's."""
        if self.apex is None:
            return InPlaceMasters(optimizer, parameters)
        if not isinstance(optimizer, self.apex.FusedAdam):
            raise UsageError(
                f"precision apex updates with Apex's FusedAdam, not {type(optimizer).__name__}: give strategy() one, "
                "made by commlab.apex.fused_adam()"
            )
        copies = [master_of(item, optimizer) for item in parameters]
        if not self.apex.prepare(model, level):
            return InPlaceMasters(optimizer, parameters)
        return Fp32Masters(self.apex, optimizer, parameters, copies)

    def autocast(self) -> AbstractContextManager[None]:
        """Context for the forward pass and the loss."""
        if not self.casts:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self.dtype)

    @property
    def scale(self) -> float:
        """What the loss is multiplied by: the loss scale, or 1 where there is none."""
        return 1.0 if self.loss_scale is None else self.loss_scale.value


def _slowdown(dtype: torch.dtype, device: torch.device) -> float:
    """Time of a 16-bit matrix product over that of this product in fp32; the best of three of each."""

    def best_s(kind: torch.dtype) -> float:
        a, b = torch.ones(64, 256, dtype=kind, device=device), torch.ones(256, 512, dtype=kind, device=device)
        times = []
        for _ in range(4):
            started_s = time.perf_counter()
            (a @ b).float().sum().item()
            times.append(time.perf_counter() - started_s)
        return min(times[1:])

    return best_s(dtype) / best_s(torch.float32)
