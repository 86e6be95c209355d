"""Nested state as JSON text and tensors, and back: the one form in which state lies on disk and travels, without
pickle.

JSON knows neither tensors, nor tuples, nor keys that are no strings; each becomes an object with one tag, so that no
name that a user gives a parameter can be mistaken for one.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from ..errors import UsageError

_PLAIN = (bool, int, float, str, type(None))


def pack(state: Any, holder: str = "a checkpoint") -> tuple[str, dict[str, torch.Tensor]]:
    """``state`` (None, numbers, text, tensors; dicts, lists and tuples of them) as JSON text and its tensors, on the
    CPU, under names that the text refers to. Floats keep all their bits. UsageError for a value of any other type;
    ``holder``: what can't hold it."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any, where: str) -> Any:
        if torch.is_tensor(value):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous()
            return {"tensor": name}
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, list):
            return [walk(item, f"{where}[{at}]") for at, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"tuple": [walk(item, f"{where}[{at}]") for at, item in enumerate(value)]}
        if isinstance(value, dict) and all(isinstance(key, _PLAIN) for key in value):
            return {"dict": [[key, walk(item, f"{where}[{key!r}]")] for key, item in value.items()]}
        raise UsageError(
            f"{holder} cannot hold {where}, a {type(value).__name__}: it holds tensors, numbers, text, None, and "
            "lists, tuples and dicts of them"
        )

    return json.dumps(walk(state, "state")), tensors


def unpack(text: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The reverse of :func:`pack`; the result holds ``tensors`` themselves, not copies."""

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((tag, content),) = value.items()
        if tag == "tensor":
            return tensors[content]
        if tag == "tuple":
            return tuple(walk(item) for item in content)
        assert tag == "dict", tag
        return {key: walk(item) for key, item in content}

    return walk(json.loads(text))
