"""The one file that pickles: for calls whose caller has said ``allow_pickle=True``, because the contract of another
library demands it, and for Horovod's API, which takes any object. Nothing on disk is ever pickled, and nothing that a
stranger could have sent: a group's members have shown each other the job's token, or met in the launcher's store."""

from __future__ import annotations

import io
import pickle
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def dumps(obj: Any) -> bytes:
    """The object as bytes."""
    return pickle.dumps(obj)


def loads(data: bytes) -> Any:
    """The object that a rank of this group has pickled."""
    return pickle.loads(data)


def dumps_any(obj: Any) -> bytes:
    """The object as bytes, functions and classes of the program itself too where cloudpickle is there."""
    try:
        return pickle.dumps(obj)
    except Exception:
        try:
            cloudpickle: Any = import_module("cloudpickle")
        except ImportError:
            cloudpickle = None
        if cloudpickle is None:
            raise
        dumped: bytes = cloudpickle.dumps(obj)
        return dumped


def dumps_apart(obj: Any) -> tuple[bytes, list[torch.Tensor]]:
    """The object as bytes without the numbers of its dense tensors, and those tensors."""
    import torch

    tensors: list[torch.Tensor] = []

    class ApartPickler(pickle.Pickler):
        def persistent_id(self, found: Any) -> Any:
            if type(found) is not torch.Tensor or found.layout is not torch.strided or found.requires_grad:
                return None
            tensors.append(found)
            return len(tensors) - 1, str(found.dtype).removeprefix("torch."), list(found.shape), found.device.type

    stream = io.BytesIO()
    try:
        ApartPickler(stream).dump(obj)
    except Exception:
        return dumps_any(obj), []
    return stream.getvalue(), tensors


def loads_apart(data: bytes) -> tuple[Any, list[torch.Tensor]]:
    """The object that :func:`dumps_apart` has made bytes of, and its tensors, which have no numbers yet."""
    import torch

    tensors: list[torch.Tensor] = []

    class ApartUnpickler(pickle.Unpickler):
        def persistent_load(self, found: Any) -> Any:
            _, dtype, shape, device = found
            tensors.append(torch.empty(shape, dtype=getattr(torch, dtype), device=device))
            return tensors[-1]

    return ApartUnpickler(io.BytesIO(data)).load(), tensors
