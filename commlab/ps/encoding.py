"""An optimizer's state of one slice as bytes, and back: safetensors, which also hold what is no tensor, as JSON. No
pickle."""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch

from ..checkpoint.nested import pack, unpack
from ..errors import UsageError
from .messages import STATE_BYTES

_TEXT = "text"


def encode(state: dict[str, Any]) -> torch.Tensor:
    """``state`` as uint8[:]. UsageError for what :func:`commlab.checkpoint.nested.pack` can't hold, and for more bytes
    than a message may have."""
    text, tensors = pack(state)
    tensors[_TEXT] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    data = torch.frombuffer(bytearray(safetensors.torch.save(tensors)), dtype=torch.uint8)
    if data.numel() > STATE_BYTES:
        raise UsageError(f"an optimizer's state of one part has {data.numel()} B, and the most is {STATE_BYTES} B")
    return data


def decode(data: torch.Tensor) -> dict[str, Any]:
    """The state that :func:`encode` made ``data`` of; tensors are copies. UsageError for bytes that no :func:`encode`
    made."""
    try:
        tensors = safetensors.torch.load(data.numpy().tobytes())
        found = unpack(bytes(tensors.pop(_TEXT).numpy()).decode(), tensors)
        if isinstance(found, dict):
            return found
        reason = f"they hold a {type(found).__name__}"
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AssertionError) as error:
        reason = repr(error)
    raise UsageError(f"{data.numel()} B are no state of an optimizer: {reason}")
