"""A model's buffers: what forward writes into them, as batch norm does, differs between ranks, and is made alike again.

    broadcast   after each step rank 0's are everybody's, as under torch's DistributedDataParallel, which gives them at
                the beginning of the next forward
    mean        after each step floating-point buffers become the mean over ranks; others rank 0's
    local       every rank keeps its own

A rank knows what was written by the version that torch counts for each tensor. Which buffers any rank has written
travels with the verdict, a bit for each, so ranks agree on what is to be sent without a message, and a model whose
buffers nobody writes sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..collectives.allreduce import allreduce
from ..runtime.group import Group
from .copies import copy_bytes_from_rank_0, copy_from_rank_0

_BITS = 64


class _Buffer(NamedTuple):
    name: str
    module: torch.nn.Module
    key: str

    @property
    def tensor(self) -> torch.Tensor | None:
        """As it is now: a module may have put another tensor in its place."""
        return self.module._buffers.get(self.key)


class Buffers:
    """The buffers of ``model``, under ``rule``: broadcast, mean or local."""

    def __init__(self, model: torch.nn.Module, rule: str, group: Group):
        self.rule, self._group = rule, group
        self._all = list(_buffers_of(model))
        # With more buffers than bits, neighbours share one.
        self._share = -(-len(self._all) // _BITS) or 1
        self.count = len(self._all)
        """How many buffers the model has."""
        self._seen: list[tuple[int, int]] = []
        self.seen()

    def _marks(self) -> list[tuple[int, int]]:
        return [_mark(buffer.module._buffers.get(buffer.key)) for buffer in self._all]

    def seen(self) -> None:
        """All buffers are alike on all ranks now."""
        self._seen = self._marks()

    def written(self) -> int:
        """The buffers that this rank has written since :meth:`seen`, a bit for each, or for neighbours where there are
        more than 64."""
        if not self._all:
            return 0
        marks = self._marks()
        if marks == self._seen:
            return 0
        pairs = zip(self._all, marks, self._seen, strict=True)
        # torch's batch norm writes its statistics without counting a version, and counts its batches beside them: where
        # a module has written one buffer, all of its buffers count as written.
        modules = {id(buffer.module) for buffer, now, before in pairs if now != before}
        found = 0
        for at, buffer in enumerate(self._all):
            if id(buffer.module) in modules:
                found |= 1 << (at // self._share)
        return found

    def of(self, bits: int) -> list[tuple[str, torch.Tensor]]:
        """The buffers that ``bits`` stand for, by name."""
        chosen = (buffer for at, buffer in enumerate(self._all) if bits >> (at // self._share) & 1)
        return [(buffer.name, tensor) for buffer in chosen if (tensor := buffer.tensor) is not None]

    def make_alike(self, bits: int) -> None:
        """Make the buffers that ``bits`` stand for, which are equal on all ranks, alike by the rule. Collective, where
        there are any. Cost: a broadcast or an allreduce of their numbers."""
        if bits and self._group.size > 1 and self.rule != "local":
            chosen = self.of(bits)
            if self.rule == "mean":
                numbers = [tensor for _, tensor in chosen if _has_mean(tensor)]
                chosen = [(name, tensor) for name, tensor in chosen if not _has_mean(tensor)]
                _average(self._group, numbers)
            copy_bytes_from_rank_0(self._group, chosen, "buffers")
        if bits:
            self.seen()

    def make_all_alike(self) -> None:
        """Give rank 0's buffers to all ranks, unless every rank keeps its own: also those that were written in a way
        that no version tells. Collective. Cost: a digest of all buffers, where they are alike."""
        if self._all and self.rule != "local":
            copy_from_rank_0(self._group, self.of(-1))
            self.seen()


def _buffers_of(model: torch.nn.Module) -> Iterable[_Buffer]:
    known: set[int] = set()
    for prefix, module in model.named_modules():
        for key, tensor in module._buffers.items():
            if tensor is not None and id(tensor) not in known:
                known.add(id(tensor))
                yield _Buffer(f"{prefix}.{key}" if prefix else key, module, key)


def _mark(tensor: torch.Tensor | None) -> tuple[int, int]:
    if tensor is None:
        return 0, 0
    return id(tensor), 0 if tensor.is_inference() else tensor._version


def _has_mean(tensor: torch.Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_quantized


def _average(group: Group, tensors: list[torch.Tensor]) -> None:
    """The mean over ranks: float64 numbers in float64, all others in float32, each rounded once."""
    for wide in (torch.float64, torch.float32):
        chosen = [tensor for tensor in tensors if (_real(tensor).dtype == torch.float64) == (wide == torch.float64)]
        if not chosen:
            continue
        flat = torch.cat([_real(tensor).to("cpu", wide).reshape(-1) for tensor in chosen])
        allreduce(flat, "mean", "mean of buffers", group=group)
        start = 0
        for tensor in chosen:
            target = _real(tensor)
            target.copy_(flat[start : start + target.numel()].view(target.shape))
            start += target.numel()


def _real(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
