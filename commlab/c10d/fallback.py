"""What commlab leaves to gloo: point-to-point, other devices than the CPU, sparse tensors, bitwise reductions.

Whether an operation goes there depends on its kind, reduction, dtype, device and layout alone, so that all ranks choose
alike; a collective that is left to gloo keeps its place among the group's own, where ranks compare that all of them
leave it. The gloo group is made by its first use, and connects a pair of ranks by their first message: so a rank may
make it alone, as a receive from one peer does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..native.versions import count_write
from ..runtime.agreement import Signature
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..transport.base import Pending
from ..transport.gloo import group_of


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


class _Polled:
    """A work of gloo as a request."""

    def __init__(self, work: Any, peers: Sequence[int]):
        self._work, self._peers = work, peers

    def test(self) -> bool:
        return bool(self._work.is_completed())

    def peers(self) -> Sequence[int]:
        return self._peers


def leave(group: Group, kind: str, sample: torch.Tensor, detail: str, outs: Any, start: Callable[[], Any]) -> Handle:
    """A collective that gloo carries out, in its place among those of ``group``. ``start()`` gives gloo's work, which
    writes ``outs``; ``sample``: a tensor whose dtype, layout and device are every rank's, as ``detail`` is."""
    count_write(_flat(outs))
    peers = [peer for peer in range(group.size) if peer != group.rank]

    def body() -> Pending:
        work = start()
        request = _Polled(work, peers)
        while not request.test():
            yield request
        work.wait()

    layout = str(sample.layout).removeprefix("torch.")
    words = ", ".join(filter(None, (f"by gloo, {layout} on {sample.device.type}", detail)))
    return group.submit(Signature(kind, (), sample.dtype, detail=words), body())


def _flat(tensors: Any) -> Iterator[torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        yield tensors
    else:
        for each in tensors or ():
            yield from _flat(each)
