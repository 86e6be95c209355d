"""What commlab leaves to gloo: point-to-point, other devices than the CPU, sparse tensors, bitwise reductions.

Whether an operation goes there depends on its kind, reduction, dtype, device and layout alone, so that all ranks choose
alike; a collective that is left to gloo keeps its place among the group's own, where ranks compare that all of them
leave it, and then whether gloo has begun it: what gloo refuses on all ranks ends no group. The gloo group is made by
its first use, and connects a pair of ranks by their first message: so a rank may make it alone, as a receive from one
peer does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from ..errors import AgreedError, CommlabError
from ..native.versions import count_write
from ..runtime.agreement import Signature
from ..runtime.control import sides_of
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..transport.base import Pending
from ..transport.gloo import group_of
from .arguments import op_text


def _lazy_devices() -> list[Any]:
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if interfaces:
        return [
            dist.ProcessGroupGloo.create_device(interface=interface, lazy_init=True)
            for interface in interfaces.split(",")
        ]
    return [dist.ProcessGroupGloo.create_default_device(lazy_init=True)]


def connects_lazily() -> bool:
    """Whether this torch's gloo can connect two ranks by their first message; else all ranks make the group at once."""
    return "lazy_init" in (dist.ProcessGroupGloo.create_default_device.__doc__ or "")


def make_gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    """A group of gloo alone."""
    gloo_store = dist.PrefixStore("gloo", store)
    make_backend: Any = dist.ProcessGroupGloo
    try:
        options = make_backend._Options()
        options._timeout, options._devices, options._threads = timeout, _lazy_devices(), 2
        gloo = make_backend(gloo_store, rank, size, options)
    except (TypeError, AttributeError):
        gloo = make_backend(gloo_store, rank, size, timeout)
    return group_of(gloo, gloo_store, ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])


_BITWISE: Final = ("BAND", "BOR", "BXOR")
_FLOATS: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS: Final = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)
"""Those that gloo has."""


def refusal_of(reduction: Any, dtype: torch.dtype) -> str:
    """Why gloo does not reduce dense tensors of ``dtype`` by ``reduction``; empty where it does. Known before it is
    asked: among several ranks it says so late, in a thread, when peers may be under way."""
    name, kind = op_text(reduction), str(dtype).removeprefix("torch.")
    if name in _BITWISE:
        has = dtype in _INTEGERS
    elif name == "AVG":
        has = dtype in _FLOATS
    else:
        has = name in ("SUM", "PRODUCT", "MIN", "MAX") and dtype in (*_FLOATS, *_INTEGERS)
    return "" if has else f"Cannot use ReduceOp.{name} with dtype {kind} on the CPU; cast it, or take another reduction"


class _Polled:
    """A work of gloo as a request."""

    def __init__(self, work: Any, peers: Sequence[int]):
        self._work, self._peers = work, peers

    def test(self) -> bool:
        return bool(self._work.is_completed())

    def peers(self) -> Sequence[int]:
        return self._peers


_SAID_BYTES = 256
"""So much of gloo's refusal the other ranks are told."""


def leave(
    group: Group,
    kind: str,
    sample: torch.Tensor,
    detail: str,
    outs: Any,
    start: Callable[[], Any],
    *,
    shape: tuple[int, ...] = (),
) -> Handle:
    """A collective that gloo carries out, in its place among those of ``group``. ``start()`` gives gloo's work, which
    writes ``outs``; ``sample``: a tensor whose dtype, layout and device are every rank's, as ``detail`` and ``shape``
    are. The handle ends with AgreedError where gloo refuses the operation on all ranks, after which the group goes on;
    and with CommlabError, on all ranks, where it refuses on some only."""
    count_write(_flat(outs))
    peers = [peer for peer in range(group.size) if peer != group.rank]

    def body() -> Pending:
        cause: Exception | None = None
        try:
            work = start()
        except Exception as error:
            cause = error
        said = b"" if cause is None else (str(cause) or type(cause).__name__).encode(errors="backslashreplace")
        texts = [said[:_SAID_BYTES].ljust(_SAID_BYTES, b"\0")]
        if group.size > 1:
            exchange = group.transport.exchange(texts[0])
            while not exchange.test():
                yield exchange
            texts = exchange.records()
        words = [text.rstrip(b"\0").decode(errors="replace") for text in texts]
        if all(words):
            raise AgreedError(f"rank {group.rank}: {kind} by gloo: {words[group.rank]}") from cause
        if any(words):
            sides = sides_of([text or "has begun it" for text in words])
            raise CommlabError(f"rank {group.rank}: {kind} by gloo is refused on some ranks only: {sides}") from cause
        request = _Polled(work, peers)
        while not request.test():
            yield request
        work.wait()

    layout = str(sample.layout).removeprefix("torch.")
    words = ", ".join(filter(None, (f"by gloo, {layout} on {sample.device.type}", detail)))
    return group.submit(Signature(kind, shape, sample.dtype, detail=words), body())


def _flat(tensors: Any) -> Iterator[torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        yield tensors
    else:
        for each in tensors or ():
            yield from _flat(each)
