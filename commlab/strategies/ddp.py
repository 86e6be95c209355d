"""``ddp``: torch's own DistributedDataParallel over gloo, behind the same engine call. The yardstick, not ours."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..errors import AgreedError, UsageError
from ..runtime.control import gather_bytes
from ..runtime.group import Group
from ..transport.rendezvous import join_store, open_store
from .changes import Roster
from .external import External
from .options import Options

_process_groups: WeakKeyDictionary[Group, dist.ProcessGroup] = WeakKeyDictionary()
_kept: list[dist.ProcessGroup] = []
"""All process groups, for as long as the process lives: where torch's reducer is the last to let go of one, the reducer
waits for gloo's threads, with the GIL, which one of them may be waiting for."""


def _process_group(group: Group) -> dist.ProcessGroup:
    """torch's process group of the ranks of ``group``, over gloo: one for all its engines. Collective.

    Not torch's default process group: a process has one, which may be the user's, or connect other ranks.
    """
    if group not in _process_groups:
        server, address = open_store(group.size, group.timeout_s) if group.rank == 0 else (None, b"")
        address = gather_bytes(group, address, "address of torch's store")[0]
        store = server or join_store(address, group.size, group.timeout_s)
        gloo = dist.ProcessGroupGloo(store, group.rank, group.size, timedelta(seconds=group.timeout_s))
        made = dist.ProcessGroup(store, group.rank, group.size)
        kind = dist.ProcessGroup.BackendType.GLOO
        made._set_default_backend(kind)
        for device in ("cpu", "cuda"):
            made._register_backend(torch.device(device), kind, gloo)
        _kept.append(made)
        _process_groups[group] = made
    return _process_groups[group]


class _Calls(torch.nn.Module):
    """Lets DistributedDataParallel run any call on the model: in the forward of this module it gets ready for
    backward."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.called = False

    def forward(self, call: Callable[[torch.nn.Module], Any]) -> Any:
        self.called = True
        return call(self.model)


class _Front(torch.nn.Module):
    """The module that the user calls in place of the model."""

    def __init__(self, wrapped: torch.nn.Module, before: Callable[[], None]):
        """``before()`` is called when a forward pass begins whose gradients are wanted."""
        super().__init__()
        self._before = before
        # Not a submodule: state_dict() and parameters() are to be asked of the user's own model.
        self._wrapped: Callable[[Callable[[torch.nn.Module], Any]], Any]
        object.__setattr__(self, "_wrapped", wrapped)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self._before()
        return self._wrapped(lambda model: model(*args, **kwargs))


def _refuse(_: object) -> Any:
    raise UsageError("the engine of this model was closed: call the model itself")


class Ddp(External):
    """Call ``engine.model`` in the loop, not the bare model: torch prepares its reducer in the wrapper's forward."""

    name = "ddp"

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        if not hasattr(dist.ProcessGroup, "_set_default_backend"):
            raise UsageError(f"strategy ddp needs torch 2.6 or later, and this is {torch.__version__}; use allreduce")
        super().__init__(model, optimizer, group, options)
        self._look: Callable[[], None] = lambda: None
        self._wrap()

    def _wrap(self) -> None:
        options, model = self.training.options, self.training.model
        self._calls = _Calls(model)
        cap_mb = None if options.bucket_bytes is None else options.bucket_bytes / 2**20  # None: torch's own sizes
        self._ddp = DistributedDataParallel(
            self._calls, bucket_cap_mb=cap_mb, process_group=_process_group(self.training.group)
        )
        self._front = _Front(self._ddp, lambda: self._look())

    @property
    def model(self) -> torch.nn.Module:
        return self._front

    def look_before_forward(self, look: Callable[[], None]) -> None:
        self._look = look

    def replan(self, roster: Roster) -> None:
        if self._calls.called:
            raise AgreedError(
                "what is trained has changed between forward and backward(), and torch's reducer gets ready in the "
                "forward pass; change it before the forward pass of a step"
            )
        super().replan(roster)
        del self._ddp, self._front._wrapped  # torch's old reducer takes its hooks off
        front = self._front
        self._wrap()
        # The user may hold what engine.model was.
        object.__setattr__(front, "_wrapped", self._ddp)
        self._front = front

    def close(self, *, state: bool) -> None:
        super().close(state=state)
        del self._ddp
        object.__setattr__(self._front, "_wrapped", _refuse)

    def no_sync(self) -> AbstractContextManager[None]:
        no_sync: AbstractContextManager[None] = self._ddp.no_sync()
        return no_sync

    def backward(self, loss: torch.Tensor | None) -> None:
        if loss is None:
            # A rank without samples must still meet its peers in torch's reducer.
            loss = self._ddp(lambda model: sum(parameter.sum() for parameter in model.parameters()) * 0.0)
        if not self._calls.called:
            raise UsageError(
                "strategy ddp: the loss does not come from engine.model, without which torch exchanges nothing; call "
                "engine.model instead of the model itself"
            )
        self._calls.called = False
        super().backward(loss)
