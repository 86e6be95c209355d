"""DDP's communication hook: buckets travel while backward goes on, without a thread; a 16-bit wire with one rounding.

Without a hook the buckets of a group of commlab's are waited for in the same place, at the end of backward
(:mod:`.backward`). The hook needs no call of the engine for that: it knows which bucket is the last one.
"""

# No `from __future__ import annotations` here: DDP compares the annotations of a hook, which would be texts.
from typing import Any

import torch
import torch.distributed as dist

from ..collectives.allreduce import allreduce_async
from ..errors import UsageError
from ..native.dtypes import require_wire
from ..runtime.handle import Handle


class DDPHook:
    """``DDPHook(wire="bf16").attach(model)``: the exchange of one DistributedDataParallel.

    ``wire``: None, ``"fp16"`` or ``"bf16"``: contributions are rounded to it, added in fp32, divided by the number of
    ranks and rounded once. ``group``: the process group of the model, of commlab's backend; default: the default group.
    """

    def __init__(self, wire: str | None = None, group: Any = None):
        require_wire(wire, "DDPHook: ")
        self.wire, self._group = wire, group
        self._under_way: list[tuple[Handle, torch.Tensor, Any]] = []

    def attach(self, model: Any) -> None:
        """Register with ``model``, a DistributedDataParallel; once, and before its first backward."""
        if self._group is None:
            self._group = model.process_group
        if not hasattr(self._group, "group"):
            raise UsageError(
                f"DDPHook: the model's process group is of backend {dist.get_backend(self._group)!r}: "
                'init_process_group("commlab"), or give DistributedDataParallel a process_group of that backend'
            )
        model.register_comm_hook(self, exchange_bucket)

    def exchange(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start a bucket's allreduce; with the last bucket, complete all of them."""
        if bucket.index() == 0:
            self._under_way.clear()  # what an interrupted backward has left
        buffer = bucket.buffer()
        wire = self.wire if buffer.dtype is torch.float32 else None
        base: Any = torch.futures.Future()
        outcome: list[Any] = []
        handle = allreduce_async(buffer, "mean", wire=wire, group=self._group.group)
        self._under_way.append((handle, buffer, (base, outcome)))
        if bucket.is_last():
            self._complete()
        else:
            handle.done()
        # An error that is raised in a callback is known to C++, one that is set in Python is not.
        return base.then(lambda _: _value(outcome, buffer))  # type: ignore[no-any-return]

    def _complete(self) -> None:
        under_way, self._under_way = self._under_way, []
        for handle, _, (base, outcome) in under_way:
            try:
                handle.wait()
            except BaseException as error:
                outcome.append(error)
            base.set_result(None)


def _value(outcome: list[Any], buffer: torch.Tensor) -> torch.Tensor:
    if outcome:
        raise outcome[0]
    return buffer


def exchange_bucket(state: DDPHook, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook as DDP calls it."""
    return state.exchange(bucket)
