"""``ddp``: torch's own DistributedDataParallel over gloo, behind the same engine call. The yardstick, not ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .. import bringup
from ..collectives.group import Group
from ..errors import UsageError
from ..transport.rendezvous import store_for
from .base import Options
from .local import Local


class _Calls(torch.nn.Module):
    """Lets DistributedDataParallel run anything on the model: its forward is where it gets ready for backward."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[torch.nn.Module], Any]) -> Any:
        return call(self.model)


class _Front(torch.nn.Module):
    """What the user calls like the model itself."""

    def __init__(self, wrapped: torch.nn.Module):
        super().__init__()
        # Not a submodule: state_dict() and parameters() are to be asked of the user's own model.
        object.__setattr__(self, "_wrapped", wrapped)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(lambda model: model(*args, **kwargs))


class Ddp(Local):
    """Call ``engine.model`` in the loop, not the bare model: torch prepares its reducer in the wrapper's forward."""

    name = "ddp"

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        if options.wire is not None:
            raise UsageError("strategy ddp sends gradients as they are; a 16-bit wire is for allreduce, ps, dps")
        if not dist.is_initialized():
            launch = bringup.detect()
            store = dist.PrefixStore("ddp", store_for(launch, group.timeout_s))
            dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.size)
        super().__init__(model, optimizer, group, options)
        self._ddp = DistributedDataParallel(_Calls(model), bucket_cap_mb=options.bucket_bytes / 2**20)
        self.model = _Front(self._ddp)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        with super().no_sync(), self._ddp.no_sync():
            yield

    def _run_backward(self, loss: torch.Tensor | None) -> None:
        if loss is None:
            # A rank without samples must still meet its peers in torch's reducer.
            loss = self._ddp(lambda model: sum(parameter.sum() for parameter in model.parameters()) * 0.0)
        super()._run_backward(loss)
