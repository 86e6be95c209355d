"""Every rank's model as rank 0's: parameters and buffers are given to all, where they differ."""

from __future__ import annotations

from hashlib import sha256

import torch

from ..collectives.operations import broadcast
from ..native.dtypes import DTYPES
from ..runtime.control import exchange_records
from ..runtime.group import Group
from ..runtime.operand import byte_view


def tensors_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters, and the buffers of a dtype that travels, by name."""
    tensors = [(name, tensor.data) for name, tensor in model.named_parameters()]
    return tensors + [(name, tensor) for name, tensor in model.named_buffers() if tensor.dtype in DTYPES]


def give_from_rank_0(group: Group, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Overwrite ``tensors`` with rank 0's. Ranks that built the model from one seed have them already: a digest tells,
    and then nothing is sent. Collective."""
    digest = sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(byte_view(tensor.cpu().contiguous()).data)
    if len(set(exchange_records(group, digest.digest(), "model digest"))) == 1:
        return
    for name, tensor in tensors:
        # The shape in the name: a broadcast itself compares numbers of numbers only.
        broadcast(tensor, 0, name=f"{name} {list(tensor.shape)}", group=group)
