"""``ddp``: torch's own DistributedDataParallel over gloo, behind the same engine call. The yardstick, not ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..collectives.group import Group
from ..errors import UsageError
from ..transport.rendezvous import join_store, open_store
from .base import Options
from .local import Local

_connected: Group | None = None
"""Whose ranks torch's default process group connects, where that was made here: torch has one at a time."""


def _connect(group: Group) -> None:
    """Make torch's default process group the ranks of ``group``. Collective. One that the user made stays, if it has
    these ranks."""
    global _connected
    if dist.is_initialized() and _connected is None:
        if (dist.get_rank(), dist.get_world_size()) != (group.rank, group.size):
            raise UsageError(
                f"strategy ddp over rank {group.rank} of {group.size}, but torch.distributed was initialized before as "
                f"rank {dist.get_rank()} of {dist.get_world_size()}; leave that to commlab, or give both the same ranks"
            )
        return
    # A rank that is in two groups may have left this one's for the other's, and then all have to connect again.
    still = dist.is_initialized() and _connected is group
    if all(record == b"y" for record in group.exchange_records(b"y" if still else b"n", "torch's process group")):
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    server, address = open_store(group.size, group.timeout_s) if group.rank == 0 else (None, b"")
    address = group.gather_bytes(address, "address of torch's store")[0]
    store = server or join_store(address, group.size, group.timeout_s)
    timeout = timedelta(seconds=group.timeout_s)
    dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.size, timeout=timeout)
    _connected = group


class _Calls(torch.nn.Module):
    """Lets DistributedDataParallel run anything on the model: its forward is where it gets ready for backward."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.called = False

    def forward(self, call: Callable[[torch.nn.Module], Any]) -> Any:
        self.called = True
        return call(self.model)


class _Front(torch.nn.Module):
    """What the user calls like the model itself."""

    def __init__(self, wrapped: torch.nn.Module):
        super().__init__()
        # Not a submodule: state_dict() and parameters() are to be asked of the user's own model.
        self._wrapped: Callable[[Callable[[torch.nn.Module], Any]], Any]
        object.__setattr__(self, "_wrapped", wrapped)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(lambda model: model(*args, **kwargs))


class Ddp(Local):
    """Call ``engine.model`` in the loop, not the bare model: torch prepares its reducer in the wrapper's forward."""

    name = "ddp"

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        if options.wire is not None:
            raise UsageError("strategy ddp sends gradients as they are; a 16-bit wire is for allreduce, ps, dps")
        super().__init__(model, optimizer, group, options)
        _connect(group)
        self._calls = _Calls(model)
        self._ddp = DistributedDataParallel(self._calls, bucket_cap_mb=options.bucket_bytes / 2**20)
        self.model = _Front(self._ddp)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        with super().no_sync(), self._ddp.no_sync():
            yield

    def _run_backward(self, loss: torch.Tensor | None) -> None:
        if loss is None:
            # A rank without samples must still meet its peers in torch's reducer.
            loss = self._ddp(lambda model: sum(parameter.sum() for parameter in model.parameters()) * 0.0)
        if not self._calls.called:
            raise UsageError(
                "strategy ddp: the loss does not come from engine.model, without which torch exchanges nothing; call "
                "engine.model instead of the model itself"
            )
        self._calls.called = False
        super()._run_backward(loss)
