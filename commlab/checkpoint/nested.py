"""Nested state as JSON text and tensors, and back: the one form in which state lies on disk and travels, without
pickle.

JSON knows neither tensors, nor bytes, nor tuples, nor keys that are no strings; each becomes an object with one tag, so
that no name that a user gives a parameter can be mistaken for one. A tensor of a dtype that safetensors does not have
is kept as its bytes, with what they mean in the text.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from ..errors import UsageError
from ..runtime.raw import bytes_of, from_bytes, meaning_of, require_dense

_PLAIN = (bool, int, float, str, type(None))
_PLAIN_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
"""What every safetensors can hold."""


class _Memory:
    """The memory of the tensors that were packed: safetensors refuse numbers that two tensors share."""

    def __init__(self) -> None:
        self._taken: dict[int, list[tuple[int, int]]] = {}

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, or a copy where its memory is another's too."""
        if not tensor.numel():
            return tensor
        start = tensor.data_ptr()
        stop = start + tensor.numel() * tensor.element_size()
        taken = self._taken.setdefault(tensor.untyped_storage().data_ptr(), [])
        if any(start < other_stop and other_start < stop for other_start, other_stop in taken):
            return tensor.clone()
        taken.append((start, stop))
        return tensor


def pack(state: Any, holder: str = "a checkpoint") -> tuple[str, dict[str, torch.Tensor]]:
    """``state`` (None, numbers, text, bytes, tensors; dicts, lists and tuples of them) as JSON text and its tensors, on
    the CPU, under names that the text refers to. Floats keep all their bits. UsageError for a value of any other type;
    ``holder``: what can't hold it."""
    tensors: dict[str, torch.Tensor] = {}
    memory = _Memory()

    def walk(value: Any, where: str) -> Any:
        if torch.is_tensor(value):
            require_dense(where, value)
            if value.is_meta:
                raise UsageError(f"{where!r} is on the meta device, where it has no numbers to be saved")
            name = str(len(tensors))
            if value.dtype in _PLAIN_DTYPES and not value.is_quantized:
                tensors[name] = memory.own(value.detach().resolve_conj().resolve_neg().cpu().contiguous())
                return {"tensor": name}
            tensors[name] = memory.own(bytes_of(value).cpu())
            return {"bytes": [name, meaning_of(value)]}
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, bytes | bytearray):
            name = str(len(tensors))
            tensors[name] = torch.empty(len(value), dtype=torch.uint8, device="cpu")
            tensors[name].numpy()[:] = memoryview(value)
            return {"octets": [name, isinstance(value, bytearray)]}
        if isinstance(value, list):
            return [walk(item, f"{where}[{at}]") for at, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"tuple": [walk(item, f"{where}[{at}]") for at, item in enumerate(value)]}
        if isinstance(value, dict) and all(isinstance(key, _PLAIN) for key in value):
            return {"dict": [[key, walk(item, f"{where}[{key!r}]")] for key, item in value.items()]}
        raise UsageError(
            f"{holder} cannot hold {where}, a {type(value).__name__}: it holds tensors, numbers, text, bytes, None, "
            "and lists, tuples and dicts of them"
        )

    return json.dumps(walk(state, "state")), tensors


def unpack(text: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The reverse of :func:`pack`; the result holds ``tensors`` themselves, not copies, but for what was kept as
    bytes."""

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((tag, content),) = value.items()
        if tag == "tensor":
            return tensors[content]
        if tag == "bytes":
            # In a file bytes begin anywhere, and numbers may not.
            return from_bytes(tensors[content[0]].clone(), content[1])
        if tag == "octets":
            octets = tensors[content[0]].numpy().tobytes()
            return bytearray(octets) if content[1] else octets
        if tag == "tuple":
            return tuple(walk(item) for item in content)
        assert tag == "dict", tag
        return {key: walk(item) for key, item in content}

    return walk(json.loads(text))
