"""Objects from rank to rank: nested JSON and tensors (:mod:`.nested`); pickles only where the caller allows them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch

from ..chunks import Range
from ..collectives.delivery import deliver_async
from ..collectives.staging import root_of
from ..collectives.tensors import readable
from ..errors import AgreedError
from ..runtime import raw
from ..runtime.agreement import Signature
from ..runtime.group import Group
from ..runtime.recording import refusal
from ..runtime.world import resolve
from .nested import pack, unpack

_HEAD = struct.Struct("<cq")
_NESTED, _PICKLED, _REFUSED = b"J", b"P", b"E"
_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


def broadcast_object(obj: Any = None, root: int = 0, allow_pickle: bool = False, group: Group | None = None) -> Any:
    """``root``'s object, on every rank; elsewhere ``obj`` means nothing. Collective.

    Without ``allow_pickle`` an object is None, a number, text, a tensor, or a list, tuple or dict of them; floats keep
    all their bits. ``allow_pickle``: anything that Python can pickle; unpickling runs what the peer's program sent, so
    it is for ranks of one program. All ranks must give the same value. UsageError on all ranks for an object that can't
    travel. Cost: one delivery of its bytes.
    """
    group = resolve(group)
    if by := group.recorder():
        group.refuse("broadcast_object", None, refusal(group.rank, "broadcast_object", by)).wait()
    try:
        root = root_of(group, "broadcast_object", root)
    except Exception as error:
        group.refuse("broadcast_object", None, error).wait()
        raise
    data = _encoded(group, "broadcast_object", obj, allow_pickle) if group.rank == root else b""
    received = _exchanged(group, "broadcast_object", f"root {root}, {_mode(allow_pickle)}", data)
    return _decoded(group, "broadcast_object", {root: received[root]}, allow_pickle)[0]


def allgather_object(obj: Any, allow_pickle: bool = False, group: Group | None = None) -> list[Any]:
    """Every rank's object on every rank, in rank order. Collective. What an object may be: see
    :func:`broadcast_object`. Cost: every rank sends its bytes to each of the others."""
    group = resolve(group)
    if by := group.recorder():
        group.refuse("allgather_object", None, refusal(group.rank, "allgather_object", by)).wait()
    data = _encoded(group, "allgather_object", obj, allow_pickle)
    received = _exchanged(group, "allgather_object", _mode(allow_pickle), data)
    return _decoded(group, "allgather_object", dict(enumerate(received)), allow_pickle)


def _mode(allow_pickle: bool) -> str:
    return "pickles allowed" if allow_pickle else "JSON and tensors"


def _encoded(group: Group, kind: str, obj: Any, allow_pickle: bool) -> bytes:
    """The object's bytes, or the words that every rank will raise."""
    try:
        if allow_pickle:
            from .pickled import dumps

            return _PICKLED + dumps(obj)
        text, tensors = pack(obj, f"{kind} without allow_pickle=True")
        dense = [readable(tensor, f"a tensor of {list(tensor.shape)} in it") for tensor in tensors.values()]
        pieces = [raw.bytes_of(tensor).cpu().numpy().tobytes() for tensor in dense]
        head = json.dumps([text, [raw.meaning_of(tensor) for tensor in dense]]).encode()
    except Exception as error:
        return _REFUSED + f"rank {group.rank}: {kind}: {error}".encode()
    return _HEAD.pack(_NESTED, len(head)) + head + b"".join(pieces)


def _exchanged(group: Group, kind: str, detail: str, data: bytes) -> list[bytes]:
    found: list[torch.Tensor] = []

    def room(sizes: Sequence[int]) -> list[torch.Tensor]:
        found.extend(torch.empty(size_bytes, dtype=torch.uint8, device="cpu") for size_bytes in sizes)
        return found

    own = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _NOTHING
    signature = Signature(kind, detail=detail)
    deliver_async(group, signature, [own], [Range(0, own.numel())] * group.size, room).wait()
    return [each.numpy().tobytes() for each in found]


def _decoded(group: Group, kind: str, received: dict[int, bytes], allow_pickle: bool) -> list[Any]:
    refused = [data[1:].decode() for data in received.values() if data[:1] == _REFUSED]
    if refused:
        raise AgreedError("; ".join(refused))
    objects = []
    for data in received.values():
        if data[:1] == _PICKLED:
            assert allow_pickle, "ranks have agreed on the mode"
            from .pickled import loads

            objects.append(loads(data[1:]))
            continue
        _, size_bytes = _HEAD.unpack_from(data)
        start = _HEAD.size + size_bytes
        text, meanings = json.loads(data[_HEAD.size : start])
        tensors: dict[str, torch.Tensor] = {}
        for index, meaning in enumerate(meanings):
            size_bytes = math.prod(meaning["shape"]) * getattr(torch, meaning["dtype"]).itemsize
            content = (
                torch.frombuffer(bytearray(data[start : start + size_bytes]), dtype=torch.uint8)
                if size_bytes
                else _NOTHING
            )
            tensors[str(index)] = raw.from_bytes(content, meaning)
            start += size_bytes
        objects.append(unpack(text, tensors))
    return objects
