"""``ddp``: torch's own DistributedDataParallel over gloo, behind the same engine call. The yardstick, not ours.

``engine.model`` is the user's own model here too, whose state, mode and hooks are its own: torch's wrapper stands
beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..errors import AgreedError
from ..gradients.own_hooks import OwnHook
from ..runtime.control import gather_bytes
from ..runtime.elsewhere import waiting_elsewhere
from ..runtime.group import Group
from ..transport.gloo import group_of
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
        made = group_of(gloo, store, ("cpu", "cuda"))
        _kept.append(made)
        _process_groups[group] = made
    return _process_groups[group]


class _Parameters(torch.nn.Module):
    """What DistributedDataParallel wraps: the user's model, which it does not run. In its forward it sends rank 0's
    buffers to all ranks, and gets ready for one backward; who has computed the loss does not matter to it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[torch.nn.Module], Any]) -> Any:
        return call(self.model)


class Ddp(External):
    """The user calls the model itself, or parts of it. torch's reducer watches the parameters, and wants to be made
    ready before each backward that exchanges: at the model's forward, or else in ``engine.backward()``."""

    name = "ddp"

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        super().__init__(model, optimizer, group, options)
        self._look: Callable[[], None] = lambda: None
        self._is_ready = False
        """Whether torch's reducer waits for the step's gradients."""
        self._wrap()
        scripted = isinstance(model, torch.jit.ScriptModule)  # takes no hooks
        self._hook = None if scripted else model.register_forward_pre_hook(OwnHook(self._begins))

    def _wrap(self) -> None:
        options, group = self.training.options, self.training.group
        cap_mb = None if options.bucket_bytes is None else options.bucket_bytes / 2**20  # None: torch's own sizes
        # Buffers are made alike after each step, by the rule of the options, under every strategy. torch 2.13 has
        # another name for the switch.
        names = signature(DistributedDataParallel.__init__).parameters
        switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        no_buffers: dict[str, Any] = {switch: False}
        gloo, wrapped = _process_group(group), _Parameters(self.training.model)
        # torch waits for all ranks in the kernel, and would wait for one that has left until gloo's timeout.
        self._guarded = partial(waiting_elsewhere, group, abort=getattr(gloo, "abort", None))
        with self._guarded("the construction of DistributedDataParallel"):
            self._ddp = DistributedDataParallel(wrapped, bucket_cap_mb=cap_mb, process_group=gloo, **no_buffers)

    def _forward(self, call: Callable[[torch.nn.Module], Any]) -> Any:
        # Buckets are planned together in the first ones that have a backward.
        with self._guarded(f"the forward of ddp in step {self.training.steps + 1}"):
            return self._ddp(call)

    def _begins(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return  # there backward() itself gets torch ready
        # Not where the user evaluates, on one rank perhaps: with torch's own wrapper that rank would wait for the rest.
        if torch.is_grad_enabled():
            self._look()
            if self.buckets.syncing and not self._is_ready:
                self._get_ready()

    def _get_ready(self) -> None:
        self._is_ready = True
        self._forward(lambda model: None)

    def look_before_forward(self, look: Callable[[], None]) -> None:
        self._look = look

    def replan(self, roster: Roster) -> None:
        if self._is_ready:
            raise AgreedError(
                "what is trained has changed between forward and backward(), and torch's reducer gets ready in the "
                "forward pass; change it before the forward pass of a step"
            )
        super().replan(roster)
        del self._ddp  # torch's old reducer takes its hooks off
        self._wrap()

    def close(self, *, state: bool) -> None:
        super().close(state=state)
        if self._hook is not None:
            self._hook.remove()
        del self._ddp

    def no_sync(self) -> AbstractContextManager[None]:
        no_sync: AbstractContextManager[None] = self._ddp.no_sync()
        return no_sync

    def backward(self, loss: torch.Tensor | None, retain_graph: bool) -> None:
        if loss is None:
            # A rank without samples must still meet its peers in torch's reducer.
            self._is_ready = self.buckets.syncing
            loss = self._forward(lambda model: sum(parameter.sum() for parameter in model.parameters()) * 0.0)
        elif self.buckets.syncing and not self._is_ready:
            self._get_ready()
        if not self._ddp.require_backward_grad_sync:
            super().backward(loss, retain_graph)
            return
        with self._guarded(f"the backward of ddp in step {self.training.steps + 1}"):
            super().backward(loss, retain_graph)

    def forget(self) -> None:
        self._is_ready = False
