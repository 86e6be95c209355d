"""Point to point: a tensor from one rank to another. Only the two ranks take part, so nothing is agreed on before:
what the sender says goes ahead of the numbers, and the receiver compares it with what it has room for.

Messages of one pair arrive in the order in which they were sent, whatever the group's collectives do meanwhile; each
pair and direction has a queue of its own. Cost: a message of 256 bytes, and one of the tensor's bytes.
"""

from __future__ import annotations

import operator
from collections.abc import Generator
from typing import Any

import numpy as np
import torch

from ..errors import DisagreementError, RefusedError, UsageError
from ..native.versions import count_write
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..runtime.recording import recorder, refusal, unrecorded
from ..runtime.world import resolve
from ..transport.base import Bytes, Pending, Request, Transport
from .delivery import bytes_of
from .staging import require_name
from .tensors import carrier, described, readable, writable

_WORDS_BYTES = 248
_REFUSED = b"\1"
"""Before the reason of a sender that can't send: no dtype begins so."""
_SEGMENT_BYTES = 1 << 30
"""The most that one message of a transport has: some count bytes in 32 bits."""


def send_async(tensor: torch.Tensor, to: int, name: str | None = None, group: Group | None = None) -> Handle:
    """Start to send ``tensor``, of any dtype, to rank ``to`` of the group, which calls :func:`recv`; the handle's
    ``wait()`` returns once the tensor may be written again. Only these two ranks take part. UsageError for what can't
    be sent, which the receiver is told; PeerLostError and PeerTimeoutError from ``wait()``."""
    group = resolve(group)
    peer, where = _peer(group, to, "send", tensor)
    try:
        if by := recorder():
            raise refusal(group.rank, "send", by)
        data, words = _sent(tensor, where, name)
    except Exception as error:
        reason = (_REFUSED + str(error).encode(errors="replace"))[:_WORDS_BYTES]
        with unrecorded():
            _send(group, peer, _NOTHING, reason.ljust(_WORDS_BYTES, b"\0"), f"refusal to rank {peer}", None).done()
        raise
    return _send(group, peer, data, words, f"send of {described(tensor)} to rank {peer}", tensor)


_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


def _sent(tensor: torch.Tensor, where: str, name: str | None) -> tuple[torch.Tensor, bytes]:
    """The tensor's bytes, and what is said of them."""
    memory, meaning = readable(tensor, where), ""
    if memory.is_quantized:
        memory, meaning = carrier(memory, where)
    plain = memory.to("cpu").contiguous()
    return bytes_of(plain), _words(tensor, name, where, meaning)


def _send(group: Group, peer: int, data: torch.Tensor, words: bytes, what: str, result: Any) -> Handle:
    header = np.frombuffer(data.numel().to_bytes(8, "little") + words, np.uint8)

    def body(transport: Transport) -> Pending:
        for part in (header, *_segments(data.numpy())):
            request = transport.isend(part, peer)
            while not request.test():
                yield request
            group.bytes_sent += part.size
            group.messages_sent += 1

    return group.direct.start(peer, "send", body, what, result)


def recv_async(tensor: torch.Tensor, frm: int, name: str | None = None, group: Group | None = None) -> Handle:
    """Start to receive into ``tensor`` what rank ``frm`` of the group sends (:func:`send`); the handle's ``wait()``
    returns it. Only these two ranks take part. DisagreementError from ``wait()``, on this rank, where the sender's
    message has another dtype, number of elements or name: it is dropped, and the next one may fit; RefusedError where
    the sender could not send. UsageError for what can't be received into: the message is dropped when it comes."""
    group = resolve(group)
    peer, where = _peer(group, frm, "recv", tensor)

    def dropped(transport: Transport) -> Pending:
        size_bytes, _ = yield from _header(transport, peer)
        yield from _drop(transport, size_bytes, peer)

    try:
        if by := recorder():
            raise refusal(group.rank, "recv", by)
        own = writable(tensor, where)
        memory, meaning = carrier(own, where) if own.is_quantized else (own, "")
        in_place = memory.is_cpu and memory.is_contiguous() and not (memory.is_neg() or memory.is_conj())
        room = memory if in_place else torch.empty(memory.shape, dtype=memory.dtype, device="cpu")
        data, expected = bytes_of(room), _words(tensor, name, where, meaning)
    except Exception:
        group.direct.start(peer, "recv", dropped, f"drop of a message of rank {peer}", None)
        raise

    def body(transport: Transport) -> Pending:
        size_bytes, words = yield from _header(transport, peer)
        if words.startswith(_REFUSED):
            raise RefusedError(
                f"{where}: rank {peer} could not send what is to be received here: {_shown(words[1:])}; the next "
                "message may fit"
            )
        if words != expected or size_bytes != data.numel():
            yield from _drop(transport, size_bytes, peer)
            raise DisagreementError(
                f"rank {group.rank} receives {_shown(expected)} from rank {peer}, which has sent {_shown(words)}; the "
                "message was dropped. Calls of send() and recv() must meet in one order, with equal dtypes and sizes"
            )
        for part in _segments(data.numpy()):
            yield from _arrive(transport, part, peer)
        if not in_place:
            with torch.inference_mode(tensor.is_inference()):
                memory.copy_(room)
        count_write((tensor,))

    return group.direct.start(peer, "recv", body, f"recv of {described(tensor)} from rank {peer}", tensor)


def send(tensor: torch.Tensor, to: int, name: str | None = None, group: Group | None = None) -> None:
    """Send ``tensor`` to rank ``to`` of the group and return once it may be written again, which for a long tensor is
    when the peer receives it; see :func:`send_async`. Two ranks that send to each other at once use that."""
    send_async(tensor, to, name, group).wait()


def recv(tensor: torch.Tensor, frm: int, name: str | None = None, group: Group | None = None) -> torch.Tensor:
    """Receive into ``tensor`` what rank ``frm`` of the group sends, and return it; see :func:`recv_async`."""
    received: torch.Tensor = recv_async(tensor, frm, name, group).wait()
    return received


def _peer(group: Group, rank: int, kind: str, tensor: Any) -> tuple[int, str]:
    where = f"rank {group.rank}: {kind} of {described(tensor)}"
    try:
        peer = operator.index(rank)
    except TypeError:
        peer = -1
    if not 0 <= peer < group.size or peer == group.rank:
        raise UsageError(f"{where}: {rank!r} is no other rank of a group of {group.size}")
    return peer, where


def _words(tensor: torch.Tensor, name: str | None, where: str, meaning: str) -> bytes:
    """What both sides must have alike, in words: the dtype, the number of elements, the name."""
    require_name(where, name)
    parts = str(tensor.dtype).removeprefix("torch."), f"{tensor.numel()} elements", repr(name) if name else "", meaning
    data = ", ".join(filter(None, parts)).encode(errors="replace")
    if len(data) > _WORDS_BYTES:
        raise UsageError(f"{where}: name {name!r} is longer than {_WORDS_BYTES - 64 - len(meaning)} bytes")
    return data.ljust(_WORDS_BYTES, b"\0")


def _shown(words: bytes) -> str:
    return words.rstrip(b"\0").decode(errors="replace")


def _segments(data: Bytes) -> list[Bytes]:
    return [data[start : start + _SEGMENT_BYTES] for start in range(0, data.size, _SEGMENT_BYTES)]


def _header(transport: Transport, peer: int) -> Generator[Request, None, tuple[int, bytes]]:
    """How many bytes follow, and what is said of them."""
    header = np.empty(8 + _WORDS_BYTES, np.uint8)
    yield from _arrive(transport, header, peer)
    return int.from_bytes(header[:8].tobytes(), "little"), header[8:].tobytes()


def _drop(transport: Transport, size_bytes: int, peer: int) -> Pending:
    for part in _segments(np.empty(size_bytes, np.uint8)):
        yield from _arrive(transport, part, peer)


def _arrive(transport: Transport, part: Bytes, peer: int) -> Pending:
    request = transport.irecv(part, peer)
    while not request.test():
        yield request
